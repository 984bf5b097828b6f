"""Whether a run that exists is the one asked for: options, prompts, weights and libraries.

All comparisons of a run with today's are here: the writer of a run and the processes of a cluster
call them with what the run's attribute ``config`` says and with what it would say today.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from zarrtrace.errors import ConfigMismatchError

# Keys of a configuration that speak of files of a model or of SAEs, and how differences are called.
_WEIGHTS = {
    "model_fingerprint": "weights of the model",
    "model_settings": "configuration of the model",
    "end_of_sequence": "end-of-sequence tokens of the model",
    "saes": "weights of SAEs",
    "sae_hooks": "hook points of SAEs",
}
# Keys by SAE.
_BY_SAE = ("saes", "sae_hooks")
# Keys that runs made before them lack: these are resumed, too.
_ADDED = ("sae_hooks", "end_of_sequence")
_NAMES_SHOWN = 5
_BETWEEN_VERSIONS = ", "
_VERSION_OF = "version of "
_GENERATION = "generation"
_TRANSFORMERS = f"{_VERSION_OF}transformers"


class Difference(NamedTuple):
    """One thing in which a run differs from what is asked for."""

    key: str
    stored: Any
    now: Any

    @property
    def there(self) -> str:
        """The stored value in brief: of a long one, what today's lacks."""
        return _brief(self.stored, self.now)

    @property
    def here(self) -> str:
        """Today's value in brief: of a long one, what the stored one lacks."""
        return _brief(self.now, self.stored)

    @property
    def name(self) -> str:
        """The part of the run that differs, as a reader of the error knows it."""
        return _WEIGHTS[self.key] if self.is_of_weights else self.key

    def __str__(self) -> str:
        """Say what differs: a hash of a prompt says nothing to a reader, its scenario does."""
        if self.key == "prompts" and isinstance(self.stored, dict) and isinstance(self.now, dict):
            both = [name for name in self.stored if name in self.now]
            names = [name for name in both if self.stored[name] != self.now[name]]
            return f"prompts: {_listed(names)} changed"
        if self.key == "prompts":  # a table has one hash of all
            return "prompts changed"
        return f"{self.name}: {self.there} there, {self.here} now"

    @property
    def is_of_weights(self) -> bool:
        """Whether files have other contents, and not another model or SAE was asked for."""
        if self.key in _BY_SAE:
            both = isinstance(self.stored, dict) and isinstance(self.now, dict)
            return both and self.stored.keys() == self.now.keys()
        return self.key in _WEIGHTS


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Compare two configurations, each library by itself.

    Parameters
    ----------
    stored, now
        Configuration of a run, and the one that it would have if started now. Under
        ``"versions"`` each holds versions by library; the stored ones may name several.
    """
    before, after = _in_parts(stored, now), _in_parts(now, stored)
    found = [
        Difference(key, before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if not _same(key, before.get(key), after.get(key))
    ]
    if before.get(_TRANSFORMERS) != after.get(_TRANSFORMERS):
        # Versions of it describe one configuration in different words.
        found = [one for one in found if one.key != "model_settings"]
    return found


def _in_parts(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with each library, and each setting of continuations, by itself."""
    versions = config.get("versions", {})
    rest = {key: value for key, value in config.items() if key != "versions"}
    if isinstance(rest.get(_GENERATION), dict) and isinstance(other.get(_GENERATION), dict):
        rest |= {f"{_GENERATION}: {key}": value for key, value in rest.pop(_GENERATION).items()}
    return rest | {f"{_VERSION_OF}{name}": version for name, version in versions.items()}


def _is_version(key: str) -> bool:
    return key.startswith(_VERSION_OF)


def _same(key: str, stored: Any, now: Any) -> bool:
    if _is_version(key) and isinstance(stored, str):
        return now in stored.split(_BETWEEN_VERSIONS)
    if key in _ADDED and (stored is None or now is None):
        return True
    if key == "sae_hooks" and isinstance(stored, dict) and isinstance(now, dict):
        # Of SAEs that only one of the two has, "saes" says so.
        return all(now.get(sae, hook) == hook for sae, hook in stored.items())
    return bool(stored == now)


def refuse_other(
    where: object,
    stored: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    accept_versions: bool = False,
) -> None:
    """Refuse to resume a run that was started otherwise.

    Parameters
    ----------
    where
        The run, as the error names it.
    stored, now
        As for :func:`differences`.
    accept_versions
        Whether libraries may have other versions than those that began the run.

    Raises
    ------
    ConfigMismatchError
        If anything else differs, with both values.
    """
    found = [
        one for one in differences(stored, now) if not (accept_versions and _is_version(one.key))
    ]
    if not found:
        return
    # Other numbers of repeats make other names of traces.
    is_generated = any(one.key.startswith(_GENERATION) for one in found)
    if "scenarios" in (one.key for one in found) and not is_generated:
        refuse_other_scenarios(where, stored["scenarios"], now["scenarios"])
    only_versions = all(_is_version(one.key) for one in found)
    kind = "other versions" if only_versions else "another configuration"
    if is_generated:
        found = [one for one in found if one.key != "scenarios"]
    lines = "".join(f"\n  {one}" for one in found)
    what = f"{where}: this run was started with {kind}:{lines}"
    if all(one.is_of_weights for one in found):
        raise ConfigMismatchError(
            what,
            why="Files of the model or of an SAE changed under the same name: the run would mix "
            "two.",
            remedy="Restore the files, choose another --output, or replace the run with "
            "--overwrite.",
        )
    if only_versions:
        raise ConfigMismatchError(
            what,
            why="Other versions of these libraries may compute or store other numbers.",
            remedy="Install the versions of the run, replace it with --overwrite, or go on with "
            "--accept-versions: its traces then name both.",
        )
    tokens = "Scenarios were edited, or the tokenizer makes other tokens of them."
    raise ConfigMismatchError(
        what,
        why=tokens if {one.key for one in found} == {"prompts"} else "",
        remedy="Repeat the old options to go on, choose another --output, or replace the run "
        "with --overwrite.",
    )


def refuse_other_scenarios(where: object, stored: Sequence[str], now: Sequence[str]) -> None:
    """Refuse to resume a run of other scenarios.

    Parameters
    ----------
    where
        The run, as the error names it.
    stored, now
        Names of the run's scenarios, and of those that are asked for.

    Raises
    ------
    ConfigMismatchError
        If they are not the same names.
    """
    left = [name for name in stored if name not in set(now)]
    new = [name for name in now if name not in set(stored)]
    if not left and not new:
        return
    if len(left) == len(stored):
        what = f"holds {_count(len(stored), 'other scenario')}: {_listed(left)}"
    else:
        parts = [f"not asked for now: {_listed(left)}"] if left else []
        parts += [f"not in the run: {_listed(new)}"] if new else []
        what = f"was started with other scenarios; {'; '.join(parts)}"
    raise ConfigMismatchError(
        f"{where}: {what}",
        why=f"The scenarios of a run are fixed when it starts. It has {len(stored)}, this command "
        f"names {len(now)}.",
        remedy="Choose another --output, or replace the run with --overwrite.",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def combined_versions(stored: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Name the versions that began a run or a trace, and those that resume it.

    Returns
    -------
    dict
        As in ``{"torch": "2.4.0, 2.13.0"}``, in the order in which they wrote.
    """
    combined = dict(stored)
    for name, version in now.items():
        known = stored[name].split(_BETWEEN_VERSIONS) if name in stored else []
        if version not in known:
            combined[name] = _BETWEEN_VERSIONS.join([*known, version])
    return combined


def _brief(value: Any, other: Any) -> str:
    """Describe a value; a long list or mapping by what the other one lacks."""
    if not isinstance(value, list | dict) or len(value) <= 4:
        return repr(value)
    parts, known = _parts(value), _parts(other)
    reordered = parts.keys() == known.keys()
    own = [part for part in parts if reordered or part not in known]
    shown = ", ".join(own[:3])
    return f"{len(parts)}" + (f" ({shown}{', …' if len(own) > 3 else ''})" if own else "")


def _parts(value: Any) -> dict[str, None]:
    """Return the elements of a list or mapping as text, in order."""
    if isinstance(value, dict):
        return dict.fromkeys(f"{name}: {part!r}" for name, part in value.items())
    return dict.fromkeys(map(repr, value)) if isinstance(value, list) else {}
