"""Which model the reference is, and when two reference models are the same: by content, not by name.

The identity is a digest over the SHA-256 of every weight file (base and adapter separately), the raw
config.json without a short list of keys that cannot change a log-probability, and the compute type. A path, a
learning rate, a beta or a world size is not in it. Files are hashed before any sharding, so ZeRO-3 changes
nothing.
"""

import hashlib
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE

from dpo.config import ModelConfig, ReferenceConfig, flat
from dpo.errors import UserError
from dpo.files import sha256_of, write_file
from dpo.model.files import adapter_files, base_of, code_files, raw_config, weight_files
from dpo.model.quantized import scheme
from dpo.pools import in_order

logger = logging.getLogger(__name__)

IDENTITY_VERSION = 2
INERT_CONFIG_KEYS = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_commit_hash",  # file
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params",  # generation
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout",  # dropout is always off (law 0)
    "attention_dropout", "hidden_dropout", "dropout",
)  # fmt: skip
FILES = ("weights", "adapter", "code")
HASHES_FILE = "file_hashes.json"
HASH_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceIdentity:
    """The components of the identity, kept separately so that an error can say which one differs."""

    version: int
    weights: dict[str, str]
    """File name -> SHA-256 (hex) of each safetensors file of the base model."""
    adapter: dict[str, str]
    """File name -> SHA-256 (hex) of a PEFT adapter's configuration and weights; empty without one."""
    code: dict[str, str]
    """File name -> SHA-256 (hex) of model code that comes with the checkpoint; empty for models that
    transformers implements."""
    config: dict[str, Any]
    """config.json as written, without the keys that cannot matter."""
    dtype: str
    """Compute type of the log-probs."""
    quantization: str | None = None
    """How the weights are rounded, and the version of the library that does it; None: not at all."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over all components; its first 16 digits name the cache's folder.

        Files count by content and order, not by name.
        """
        parts = {name: list(part.values()) if name in FILES else part for name, part in self._parts().items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The content of identity.json."""
        return {**self._parts(), "digest": self.digest}

    def _parts(self) -> dict[str, Any]:
        """The components; without a quantization where there is none, as in caches that are older."""
        return {name: part for name, part in asdict(self).items() if part is not None}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "ReferenceIdentity":
        """Reads identity.json; ValueError if the digest does not match the components."""
        components = {**content}
        digest = components.pop("digest")
        if not all(isinstance(components.get(part), dict) for part in (*FILES, "config")):
            raise ValueError("a component is missing or has another type")
        identity = ReferenceIdentity(**components)
        if identity.digest != digest:
            raise ValueError("its digest does not match its content")
        return identity

    def differences(self, other: "ReferenceIdentity") -> list[str]:
        """What differs, as `component: value of self -> value of other`, for people; else empty."""
        found = []
        mine, theirs = (flat(asdict(identity)) for identity in (self, other))
        for key in sorted(mine.keys() | theirs.keys()):
            before, after = mine.get(key), theirs.get(key)
            if before != after:
                is_file = key.partition(".")[0] in FILES
                shown = [str(value)[:12] if is_file and value else value for value in (before, after)]
                found.append(f"{key}: {shown[0]} -> {shown[1]}")
        return found


def reference_model(model: ModelConfig, reference: ReferenceConfig) -> ModelConfig:
    """The reference model, with the policy's compute type and attention kernel.

    Args:
        model: The policy.
        reference: `reference.model` names the reference. Default: the model that the policy starts from, or
            an adapter with its base where that is its start, and always as it was before training.
    """
    if reference.model is None:
        return replace(model, lora=None)
    return replace(model, name_or_path=reference.model, revision=None, lora=None)


def reference_identity(model: ModelConfig, cache_dir: Path) -> ReferenceIdentity:
    """Hashes the model's files, or looks their hashes up.

    Args:
        model: A local folder or a hub name.
        cache_dir: Root of the caches, where the hashes of local files are stored.

    Raises:
        UserError: No such model, or no safetensors in it.
    """
    base, hashes = base_of(model), cache_dir / HASHES_FILE
    raw = raw_config(base)
    return ReferenceIdentity(
        version=IDENTITY_VERSION,
        weights=_digests(weight_files(base), hashes),
        adapter=_digests(adapter_files(model), hashes),
        code=_digests(code_files(base), hashes),
        config={key: value for key, value in raw.items() if key not in INERT_CONFIG_KEYS},
        dtype=model.dtype,
        quantization=scheme(model),
    )


def is_remembered(model: ModelConfig, cache_dir: Path) -> bool:
    """Whether `reference_identity` would hash no weight file. True for every model that has a cache."""
    known = _read_hashes(cache_dir / HASHES_FILE)
    paths = [path.resolve() for path in weight_files(base_of(model))]
    return all(_is_blob(path) or _known(known, path) is not None for path in paths)


def known_names(identity: ReferenceIdentity, cache_dir: Path) -> list[str]:
    """Folders and hub names under which this machine has the model's weights, as far as it remembers.

    Args:
        identity: Of the model.
        cache_dir: Root of the caches, where file hashes are remembered.
    """
    wanted = {*identity.weights.values(), *identity.adapter.values()}
    known = _read_hashes(cache_dir / HASHES_FILE).items()
    folders = {str(Path(path).parent) for path, entry in known if entry.get("sha256") in wanted}
    blobs = (path for digest in wanted for path in Path(HF_HUB_CACHE).glob(f"models--*/blobs/{digest}"))
    hub = {path.parents[1].name.removeprefix("models--").replace("--", "/") for path in blobs}
    return sorted(folders | hub)


def policy_is_reference(policy: ModelConfig, identity: ReferenceIdentity, cache_dir: Path) -> bool:
    """Whether the policy starts as the reference, by content.

    Args:
        policy: The model that training starts from.
        identity: That of the reference.
        cache_dir: Root of the caches, where the hashes of local files are stored.
    """
    return reference_identity(policy, cache_dir).digest == identity.digest


def _digests(paths: list[Path], hashes: Path) -> dict[str, str]:
    """File name -> SHA-256 (hex), from the hub cache's file name, from the file `hashes`, or by hashing.

    The hub cache names a large file by its SHA-256. A local file is hashed once and found again by (path,
    size, modification and change time, inode): editing it in place changes at least the change time.
    """
    if not paths:
        return {}
    known = _read_hashes(hashes)
    root = os.path.commonpath([path.parent for path in paths])
    names = {path: str(path.relative_to(root)) for path in paths}
    found: dict[str, str] = {}
    unknown: list[Path] = []
    for path in paths:
        resolved = path.resolve()
        digest = resolved.name if _is_blob(resolved) else _known(known, resolved)
        if digest is None:
            unknown.append(path)
        else:
            found[names[path]] = digest
    if unknown:
        pool = ThreadPoolExecutor(HASH_THREADS)  # hashing releases the GIL
        hashed = in_order(pool, _hashed, unknown, ahead=len(unknown))
        entries = dict(zip(unknown, hashed, strict=True))
        found |= {names[path]: str(entry["sha256"]) for path, entry in entries.items()}
        _add_hashes(hashes, {str(path.resolve()): entry for path, entry in entries.items()})
    return {name: found[name] for name in names.values()}


def _is_blob(path: Path) -> bool:
    return path.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", path.name) is not None


def _known(hashes: dict[str, Any], path: Path) -> str | None:
    entry = hashes.get(str(path))
    if not isinstance(entry, dict) or entry.get("stamp") != _stamp(path):
        return None
    return str(entry["sha256"])


def _hashed(path: Path) -> dict[str, Any]:
    resolved = path.resolve()
    stamp = _stamp(resolved)
    digest = sha256_of(resolved)
    if _stamp(resolved) != stamp:
        raise UserError(f"{path}: changed while it was read; wait until it is written, and try again")
    return {"stamp": stamp, "sha256": digest}


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read_hashes(hashes: Path) -> dict[str, Any]:
    try:
        known = json.loads(hashes.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _add_hashes(hashes: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Adds entries to the file. What another process adds meanwhile may be lost; it is then hashed again."""
    try:
        hashes.parent.mkdir(parents=True, exist_ok=True)
        write_file(hashes, json.dumps(_read_hashes(hashes) | entries, indent=1))
    except OSError as error:  # a read-only cache, for example, can be used all the same
        logger.warning(
            "%s: cannot store file hashes (%s); the next command hashes the model again",
            hashes,
            error.strerror,
        )
