/** The widget's part in the notebook: a frame with the page, and its way to the kernel. */

/** What the page and Python both set. */
const TRAITS = ["scenario", "layer", "head", "token", "feature"];

/**
 * @param {{model: any, el: HTMLElement}} widget
 * @returns {() => void} removes what was added
 */
function render({ model, el }) {
  const frame = document.createElement("iframe");
  // Scripts run, and nothing of the notebook can be reached: the frame has an origin of its own.
  frame.setAttribute("sandbox", model.get("_sandbox"));
  frame.title = "zarrtrace";
  frame.style.cssText = `width: 100%; height: ${model.get("height")}px; border: 1px solid #8888`;
  const { port1: port, port2 } = new MessageChannel();
  let isOwn = false; // a change that comes from the page does not go back to it
  frame.addEventListener("load", () => frame.contentWindow?.postMessage("zarrtrace", "*", [port2]), { once: true });
  port.onmessage = ({ data }) => {
    if (data.path !== undefined) model.send({ id: data.id, path: data.path });
    else if (data.isReady) {
      port.postMessage({ choose: model.get("_is_chosen") ? Object.fromEntries(TRAITS.map((name) => [name, model.get(name)])) : {} });
    } else {
      isOwn = true;
      for (const [name, value] of Object.entries(data.view)) model.set(name, value);
      isOwn = false;
      model.save_changes();
    }
  };
  const answer = (/** @type {any} */ said, /** @type {DataView[]} */ buffers) => {
    const bytes = buffers[0] && new Uint8Array(buffers[0].buffer, buffers[0].byteOffset, buffers[0].byteLength).slice();
    port.postMessage({ ...said, bytes }, bytes ? [bytes.buffer] : []);
  };
  const listeners = TRAITS.map((name) => [`change:${name}`, () => {
    if (!isOwn) port.postMessage({ choose: { [name]: model.get(name) } });
  }]);
  model.on("msg:custom", answer);
  for (const [event, listener] of listeners) model.on(event, listener);
  frame.srcdoc = model.get("_page");
  el.append(frame);
  return () => {
    model.off("msg:custom", answer);
    for (const [event, listener] of listeners) model.off(event, listener);
    port.close();
  };
}

export default { render };
