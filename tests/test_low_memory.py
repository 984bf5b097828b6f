"""Blocks in host memory: the same numbers, and never more than two blocks on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hub_cache
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.torch

from capturing import records_of  # noqa: E402
from sae_lens import SAE  # noqa: E402

from zarrtrace import demo  # noqa: E402
from zarrtrace.capture import Request, load_model, tokenize  # noqa: E402
from zarrtrace.capture.encoder_files import (  # noqa: E402
    encoder_stretches,
    load_encoder,
    read_config,
)
from zarrtrace.capture.release_saes import ReleaseSAEs  # noqa: E402
from zarrtrace.errors import ModelError  # noqa: E402
from zarrtrace.extraction.reading_ahead import ReadAhead, weight_files  # noqa: E402
from zarrtrace.scenarios import load_suite  # noqa: E402

RELEASE = "llama_scope_lxr_8x"


def records(model: Any, **options: Any) -> list[Any]:
    suite = load_suite(demo.suite_path())[:3]
    prompts = [tokenize(model, scenario, prepend_bos=True) for scenario in suite]
    layers = frozenset(range(len(model.blocks)))
    requests = [Request(prompt, layers, next_token=True, **options) for prompt in prompts]
    return list(records_of(model, requests, attention_dtype="float32"))


def file_pages() -> list[tuple[int, int]]:
    """Return the addresses at which this process has mapped safetensors files."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [line[0].split("-") for line in lines if line[-1].endswith(".safetensors")]
    return [(int(start, 16), int(stop, 16)) for start, stop in files]


def mapped(block: torch.nn.Module, pages: list[tuple[int, int]]) -> bool:
    """Whether all weights of a block are pages of a safetensors file."""
    return all(
        any(start <= parameter.data_ptr() < stop for start, stop in pages)
        for parameter in block.parameters()
    )


@pytest.mark.long
@pytest.mark.parametrize("blocked", [False, True])
def test_streamed_blocks_give_the_same(blocked: bool) -> None:
    name = str(demo.model_path())
    whole = records(load_model(name), blocked=blocked)
    model = load_model(name, low_memory=True)
    pages, most = file_pages(), 0

    def count(block: torch.nn.Module, *_: object) -> None:
        nonlocal most
        moved = [other for other in model.blocks if not mapped(other, pages)]
        most = max(most, len(moved))
        assert any(other is block for other in moved)

    for block in model.blocks:
        block.register_forward_pre_hook(count)
    for _ in range(2):  # a second run starts at the first block again
        streamed = records(model, blocked=blocked)
        assert len(streamed) == len(whole)
        for one, other in zip(streamed, whole, strict=True):
            assert type(one) is type(other)
            for name_, value in vars(one).items():
                if isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(value, getattr(other, name_))
    assert most == 1


def test_weights_are_the_files_own_pages(tmp_path: Path) -> None:
    """On the CPU nothing is read into memory that belongs to the process."""
    hub_cache.make_llama(tmp_path)
    model = load_model(str(tmp_path), low_memory=True)
    # One block came to the device already, to see how the model computes.
    pages = file_pages()
    assert [mapped(block, pages) for block in model.blocks] == [False, *[True] * 31]


@pytest.fixture(autouse=True)
def hub(shared_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(shared_hub / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_alone_is_what_sae_lens_loads(dtype: str) -> None:
    found = ReleaseSAEs(RELEASE).find([3, 17])
    for (default,) in found.values():
        attributes = default.model_copy(update={"dtype": dtype})
        config = read_config(RELEASE, attributes.id)
        alone = load_encoder(RELEASE, attributes, config, torch.device("cpu"))
        expected = SAE.from_pretrained(RELEASE, attributes.id, dtype=dtype)
        for name in ("W_enc", "b_enc", "b_dec", "threshold"):
            here, there = getattr(alone, name), getattr(expected, name)
            assert here.dtype == there.dtype
            torch.testing.assert_close(here, there, rtol=0, atol=0)
        inputs = torch.randn(40, attributes.d_in)
        torch.testing.assert_close(alone.encode(inputs), expected.encode(inputs), rtol=0, atol=0)
        assert (alone.encode(inputs) > 0).any()
        assert alone.cfg.normalize_activations == expected.cfg.normalize_activations == "none"
        assert alone.W_dec.numel() == 0


def test_stretches_hold_the_encoder() -> None:
    source = ReleaseSAEs(RELEASE)
    (attributes,) = source.find([5])[5]
    ((file, start, stop),) = encoder_stretches(RELEASE, [attributes])
    content = torch.frombuffer(bytearray(file.read_bytes()[start:stop]), dtype=torch.bfloat16)
    raw = SAE.from_pretrained(RELEASE, attributes.id, dtype="bfloat16").W_enc
    assert content.numel() == raw.numel()
    assert source.stretches([attributes]) == [(file, start, stop)]


def test_folding_the_decoder_needs_all_of_it() -> None:
    source = ReleaseSAEs(RELEASE, fold_decoder_norm=True)
    (attributes,) = source.find([5])[5]
    assert source.stretches([attributes]) == []
    assert source.load(attributes, torch.device("cpu"))(torch.randn(2, attributes.d_in)).any()


def test_reading_ahead_reads_each_part_once_and_keeps_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    files = weight_files(str(tmp_path))
    assert [(file.name, start, stop) for file, start, stop in files] == [
        ("a.safetensors", 0, 1000),
        ("b.safetensors", 0, 1000),
    ]
    read: list[tuple[str, int]] = []
    monkeypatch.setattr(ReadAhead, "_read", lambda _, file, at, __: read.append((file.name, at)))
    monkeypatch.setattr(
        "zarrtrace.extraction.reading_ahead.memory_sizes", lambda: {"MemAvailable": 3000}
    )
    ahead = ReadAhead(step=400, idle=0.01)
    ahead.add(files)  # both together are more than half of what is available
    for thread in ahead._threads:
        thread.join()
    assert sorted(read) == [("a.safetensors", at) for at in (0, 400, 800)]


def test_weight_files_of_a_hub_id(shared_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(shared_hub / "hub"))
    ((file, start, stop),) = weight_files("gpt2")
    assert (file.name, start, stop) == ("model.safetensors", 0, file.stat().st_size)
    assert weight_files("gpt2", "no-such-branch") == []
    assert weight_files("no/such") == []


def test_a_device_that_is_too_small_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_small(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("zarrtrace.capture.model._build", too_small)
    with pytest.raises(ModelError) as caught:
        load_model(str(demo.model_path()))
    assert "--low-memory" in caught.value.remedy
