// Reads arrays of a run with zarrita.js and prints them as JSON: node read_run.mjs RUN PATH...
import { FileSystemStore } from "@zarrita/storage";
import * as zarr from "zarrita";

const [run, ...paths] = process.argv.slice(2);
const root = zarr.root(new FileSystemStore(run));
const group = await zarr.open(root, { kind: "group" });
const arrays = {};
// Strides are those of the chunks: features lie column by column.
const inRows = (data, [size, ...shape], [step, ...stride], from = 0) =>
  size === undefined
    ? [data[from]]
    : Array.from({ length: size }, (_, i) => inRows(data, shape, stride, from + i * step)).flat();
for (const path of paths) {
  const array = await zarr.open(root.resolve(path), { kind: "array" });
  const { data, shape, stride } = await zarr.get(array);
  // NaN has no JSON; 64-bit integers are BigInt.
  const plain = (value) =>
    typeof value === "bigint" ? Number(value) : Number.isNaN(value) ? null : value;
  arrays[path] = { shape, dims: array.dimensionNames, values: inRows(data, shape, stride).map(plain) };
}
process.stdout.write(JSON.stringify({ scenarios: group.attrs.zarrtrace.scenarios, arrays }));
