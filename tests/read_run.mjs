// Reads arrays of a run with zarrita.js and prints them as JSON: node read_run.mjs RUN PATH...
import { FileSystemStore } from "@zarrita/storage";
import * as zarr from "zarrita";

const [run, ...paths] = process.argv.slice(2);
const root = zarr.root(new FileSystemStore(run));
const group = await zarr.open(root, { kind: "group" });
// NaN has no JSON; 64-bit integers are BigInt.
const plain = (value) =>
  typeof value === "bigint" ? Number(value) : Number.isNaN(value) ? null : value;
const arrays = {};
for (const path of paths) {
  const array = await zarr.open(root.resolve(path), { kind: "array" });
  const { data, shape } = await zarr.get(array);
  arrays[path] = { shape, dims: array.dimensionNames, values: Array.from(data, plain) };
}
process.stdout.write(JSON.stringify({ scenarios: group.attrs.scenarios, arrays }));
