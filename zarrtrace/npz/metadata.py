"""The layout's metadata file: tokens and key positions of every scenario."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from zarrtrace.errors import NPZError, ScenarioError
from zarrtrace.format.attributes import Extensible, GenerationAttributes, ModelAttributes
from zarrtrace.npz.files import check_inside, reading, replacing
from zarrtrace.scenarios import DECISION, check_trace_name, name_key

KEYS = ("features", "attention")

_MAX_BYTES = 2**28


class ScenarioMetadata(BaseModel):
    """One scenario's entry; fields that the layout does not have are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    scenario: str
    tokens: list[str] = Field(min_length=1)
    token_ids: list[Annotated[int, Field(ge=0, lt=2**32)]]
    seq_len: int
    key_positions: dict[str, list[NonNegativeInt]]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not len(self.tokens) == len(self.token_ids) == self.seq_len:
            raise ValueError(
                f"{len(self.tokens)} tokens, {len(self.token_ids)} token_ids and seq_len "
                f"{self.seq_len} differ"
            )
        for name, positions in self.key_positions.items():
            if any(position >= self.seq_len for position in positions):
                raise ValueError(f"key_positions.{name} is beyond seq_len {self.seq_len}")
        if self.key_positions.get(DECISION, [self.seq_len - 1]) != [self.seq_len - 1]:
            raise ValueError(f"key_positions.{DECISION} is not the last token")
        return self


class Origin(Extensible):
    """Attributes of a trace that the layout has no field for."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")
    left_out: ClassVar[frozenset[str]] = frozenset(("generation", "choice"))

    tags: tuple[str, ...] = ()
    prompt: str | None = None
    model: ModelAttributes | None = None
    generation: GenerationAttributes | None = None
    choice: str | None = None


class Metadata(BaseModel):
    """The checked content of the metadata file.

    Attributes
    ----------
    zarrtrace
        By scenario, what :func:`export_npz` adds to the layout's fields.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    timestamp: str
    n_scenarios: int
    layer_range: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]
    save_features: bool
    save_attention: bool
    scenarios: list[ScenarioMetadata] = Field(min_length=1)
    zarrtrace: dict[str, Origin] = {}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.n_scenarios != len(self.scenarios):
            raise ValueError(f"n_scenarios is {self.n_scenarios}, there are {len(self.scenarios)}")
        if not self.layer_range[0] <= self.layer_range[1] < 10**6:
            raise ValueError(f"layer_range {self.layer_range} is not [first, last]")
        if not self.keys:
            raise ValueError("neither save_features nor save_attention is true")
        return self

    @model_validator(mode="after")
    def _names_are_folders(self) -> Self:
        taken: set[str] = set()
        for name in (scenario.scenario for scenario in self.scenarios):
            try:
                key = name_key(check_trace_name(name))
            except ScenarioError as error:
                raise ValueError(error.what) from None
            if key in taken:  # also if only in case: one folder on many file systems
                raise ValueError(f"scenario {name!r} stands twice")
            taken.add(key)
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys that the files of layers may hold."""
        saved = zip(KEYS, (self.save_features, self.save_attention), strict=True)
        return tuple(key for key, there in saved if there)


def write_metadata(folder: Path, metadata: Metadata) -> Path:
    """Write the metadata file under the name that the layout gives it."""
    first, last = metadata.layer_range
    file = folder / f"metadata_L{first}_{last}_{metadata.timestamp}.json"
    with replacing(file) as out:
        content = metadata.model_dump(mode="json")
        text = json.dumps(content, indent=2, ensure_ascii=False)
        out.write(f"{text}\n".encode())
    return file


def find_metadata(folder: Path, name: str | None) -> tuple[Path, Metadata]:
    """Return a folder's metadata file and what it says; of several that agree, the newest.

    Raises
    ------
    NPZError
        If there is none, or several that say different things, or it is broken.
    """
    files = [file for file in sorted(folder.glob("metadata_L*.json")) if name in (None, file.name)]
    if not files:
        raise NPZError(
            f"{folder}: no metadata file {name or 'metadata_L*.json'}",
            why="It holds the tokens and key positions, and is written last.",
            remedy="Give the folder that holds the scenario folders and the metadata file; "
            "if its writer was interrupted, run it again.",
        )
    found = {file: _read(folder, file) for file in files}
    newest = max(found, key=lambda file: (found[file].timestamp, file.name))
    said = {file: metadata.model_dump(exclude={"timestamp"}) for file, metadata in found.items()}
    if any(other != said[newest] for other in said.values()):
        raise NPZError(
            f"{folder}: {len(files)} metadata files that say different things: "
            + ", ".join(file.name for file in files[:5]),
            why="Several runs wrote into this folder.",
            remedy="Say which one counts (metadata=NAME), or move the others away.",
        )
    return newest, found[newest]


def _read(folder: Path, file: Path) -> Metadata:
    check_inside(folder, file)
    remedy = "Restore the file from where it was written, or write the folder again."
    with reading(file):
        if not file.is_file():
            raise NPZError(f"{file}: not a regular file", remedy=remedy)
        if file.stat().st_size > _MAX_BYTES:
            raise NPZError(f"{file}: larger than any metadata file", remedy=remedy)
        content = file.read_bytes()
    try:
        return Metadata.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise NPZError(
            f"{file}: {where}: {first['msg']}" if where else f"{file}: {first['msg']}",
            why="It is cut short, edited, or not a metadata file of this layout.",
            remedy=remedy,
        ) from None
