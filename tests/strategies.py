"""Named Hypothesis strategies."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from zarrtrace.format.layout import Limits

#: Block indices of a trace: ascending, with gaps.
layers = st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True).map(
    lambda found: tuple(sorted(found))
)

#: Sequence lengths around the places where the layout changes.
lengths = st.one_of(
    st.integers(1, 40), st.integers(1, 300), st.sampled_from([15, 16, 17, 64, 65, 129, 300, 301])
)

#: Limits small enough that small traces are cut as those of long prompts are.
small_limits = st.builds(
    Limits,
    file_bytes=st.sampled_from([2**9, 2**11, 2**13, 2**16]),
    record_bytes=st.sampled_from([2**9, 2**12, 2**16]),
    keys=st.sampled_from([3, 8, 1024]),
    queries=st.sampled_from([1, 5, 16]),
    tokens=st.sampled_from([2, 3, 64]),
    features=st.sampled_from([5, 13, 4096]),
)

#: Sizes for fakes.make_shape and fakes.make_records.
trace_sizes: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "layers": layers,
        "tokens": lengths,
        "heads": st.sampled_from([None, 1, 2, 3]),
        "features": st.sampled_from([0, 1, 5, 33, 64]),
        "attention_dtype": st.sampled_from(["float16", "float32"]),
        "feature_dtype": st.sampled_from(["float16", "float32"]),
        "channels": st.sampled_from([None, 1, 7, 32]),
        "residual_dtype": st.sampled_from(["float16", "float32"]),
    }
)

#: Sizes for layouts only, of real models: nothing is written.
model_sizes: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "layers": layers,
        "tokens": st.one_of(
            st.integers(1, 3000),
            st.sampled_from([300, 301, 600, 601, 1024, 1025, 2048, 8192, 32768, 131072]),
        ),
        "heads": st.sampled_from([1, 8, 32, 40, 128]),
        "features": st.sampled_from([1, 512, 4095, 4096, 4097, 32768, 131072, 1_048_576]),
        "attention_dtype": st.sampled_from(["float16", "float32"]),
        "channels": st.sampled_from([None, 64, 768, 4096, 16384, 200_000]),
    }
)

#: Text of a prompt: any Unicode that UTF-8 can hold, without the template's own signs.
plain_text = st.text(
    st.one_of(
        st.sampled_from("ab 0189$%\n.,:Ωéß漢🎰👩‍🚀\u0301"),
        st.characters(codec="utf-8", exclude_characters="{}[]", exclude_categories=("Cs",)),
    ),
    max_size=12,
)
marked_text = plain_text.filter(bool)

#: Names of spans and values.
identifiers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True).filter(
    lambda name: name != "decision"
)

#: A prompt in pieces: plain text, or text marked as a span of that name.
pieces = st.lists(
    st.one_of(
        st.tuples(st.none(), plain_text),
        st.tuples(st.sampled_from(["balance", "goal", "choices"]), marked_text),
    ),
    min_size=1,
    max_size=8,
)
