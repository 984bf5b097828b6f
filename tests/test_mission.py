"""The commands of the README, word for word and offline, against transformers and sae-lens."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

import zarrtrace as zt
from zarrtrace.cli import main
from zarrtrace.store import verify

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("hub_home")]

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
LLAMA = (
    "zarrtrace extract --model meta-llama/Llama-3.1-8B --sae-release llama_scope_lxr_8x "
    "--layers 1-31 --scenarios slot-machine -o runs/llama"
)
GPT2 = (
    "zarrtrace extract --model gpt2 --sae-release gpt2-small-res-jb --layers 0-11 "
    "--scenarios slot-machine -o runs/gpt2"
)


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in this process: another takes ten seconds to import the libraries."""
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


def of_the_libraries(
    model_id: str, release: str, pattern: str, prompt: str, *, add_bos: bool, side: str
) -> dict[str, np.ndarray]:
    """Compute what the two libraries make of one prompt, by hooks of our own."""
    model = AutoModelForCausalLM.from_pretrained(model_id, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    ids = tokenizer(prompt)["input_ids"]
    if add_bos:
        assert ids[0] != tokenizer.bos_token_id
        ids = [tokenizer.bos_token_id, *ids]
    blocks = getattr(model.base_model, "layers", None) or model.base_model.h
    stream = {}

    def before(i: int) -> Any:
        return lambda module, args: stream.__setitem__(("pre", i), args[0])

    def after(i: int) -> Any:
        return lambda module, args, output: stream.__setitem__(
            ("post", i), output[0] if isinstance(output, tuple) else output
        )

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(before(i))
        block.register_forward_hook(after(i))
    arrays = {"ids": np.array(ids)}
    with torch.no_grad():
        made = model(torch.tensor([ids]), output_attentions=True)
        for i in range(1 if side == "post" else 0, len(blocks)):
            with warnings.catch_warnings():  # of SAEs that want the model loaded otherwise
                warnings.simplefilter("ignore", UserWarning)
                sae = SAE.from_pretrained(release, pattern.format(layer=i))
            arrays[f"features_{i}"] = sae.encode(stream[side, i])[0].numpy()
            arrays[f"attention_{i}"] = made.attentions[i][0].numpy()
        top = made.logits[0].log_softmax(-1).topk(10)
    return {**arrays, "next_token": top.indices.numpy(), "logprob": top.values.numpy()}


def check(trace: Path, expected: dict[str, np.ndarray], layers: range) -> None:
    ds = zt.open_trace(trace)
    np.testing.assert_array_equal(ds.token_id, expected["ids"])
    for layer in layers:
        here = ds.sel(layer=layer)
        np.testing.assert_array_equal(here.attention, expected[f"attention_{layer}"])
        np.testing.assert_array_equal(here.features, expected[f"features_{layer}"])
        assert (here.features > 0).any()
    np.testing.assert_array_equal(ds.next_token, expected["next_token"])
    np.testing.assert_array_equal(ds.next_token_logprob, expected["logprob"])


@pytest.mark.long  # every day, GPT-2's command runs
def test_llama_with_llama_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"$ {LLAMA}\n" in README
    monkeypatch.chdir(tmp_path)
    run(LLAMA, monkeypatch)
    assert verify(tmp_path / "runs/llama") == []
    trace = tmp_path / "runs/llama/Very_risky_25"
    attributes = json.loads((trace / "zarr.json").read_text())["attributes"]
    assert attributes["model"]["revision"] is not None
    ids = zt.open_trace(trace).sae_id.values.tolist()
    assert ids == [f"l{n}r_8x" for n in range(1, 32)]
    expected = of_the_libraries(
        "meta-llama/Llama-3.1-8B",
        "llama_scope_lxr_8x",
        "l{layer}r_8x",
        attributes["prompt"],
        add_bos=False,
        side="post",
    )
    check(trace, expected, range(1, 32))


@pytest.mark.long
@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty model_from_pretrained_kwargs")
def test_gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"$ {GPT2}\n" in README
    monkeypatch.chdir(tmp_path)
    run(GPT2, monkeypatch)
    trace = tmp_path / "runs/gpt2/Risky_40"
    attributes = json.loads((trace / "zarr.json").read_text())["attributes"]
    ds = zt.open_trace(trace)
    assert list(ds.query_token.values).count("<|begin_of_text|>") == 1
    # the release has a second SAE for the last block: it gets an array of its own
    saes = attributes["saes"]
    assert saes["features"]["hook_name"] == "blocks.{layer}.hook_resid_pre"
    assert saes["features_resid_post"]["hook_name"] == "blocks.{layer}.hook_resid_post"
    assert ds.sae_id_resid_post.values.tolist()[:-1] == [""] * 11
    assert bool(np.isnan(ds.features_resid_post.sel(layer=3)).all())
    assert bool((ds.features_resid_post.sel(layer=11) > 0).any())
    expected = of_the_libraries(
        "gpt2",
        "gpt2-small-res-jb",
        "blocks.{layer}.hook_resid_pre",
        attributes["prompt"],
        add_bos=True,
        side="pre",
    )
    check(trace, expected, range(12))
