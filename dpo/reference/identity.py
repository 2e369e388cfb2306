"""What makes two reference models the same: bytes, not names.

The identity is a digest over the SHA-256 of every weight file, the raw config.json less a short list of keys
that cannot change a log-probability, and the compute type. A path, a learning rate, a beta or a world size is
not in it.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo.config import Config, ModelConfig
from dpo.model.load import raw_config, weight_files

IDENTITY_VERSION = 1
INERT_CONFIG_KEYS = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "_commit_hash",  # file
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params",  # generation
    "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout",  # dropout is always off (law 0)
    "attention_dropout", "hidden_dropout", "dropout",
)  # fmt: skip
HASHES_FILE = "file_hashes.json"
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceIdentity:
    """Every component, so that a refusal can say what differs."""

    version: int
    weights: tuple[str, ...]
    """SHA-256 (hex) of each safetensors file, in the order of their names."""
    config: dict[str, Any]
    """config.json as written, less the keys that cannot matter."""
    dtype: str
    """Compute type of the log-probs."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over all components; its first 16 digits name the cache's folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The content of identity.json."""
        return {**asdict(self), "weights": list(self.weights), "digest": self.digest}


def reference_model(config: Config) -> ModelConfig:
    """The reference: reference.model where it is named, else the policy's start; same compute type and
    kernel.
    """
    if config.reference.model is None:
        return config.model
    return ModelConfig(
        name_or_path=config.reference.model,
        dtype=config.model.dtype,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )


def reference_identity(model: ModelConfig, cache_dir: Path) -> ReferenceIdentity:
    """Hashes the model's files, or remembers their hashes.

    Args:
        model: A local folder or a hub name.
        cache_dir: Root of the caches, where hashes of local files are remembered.

    Raises:
        UserError: No such model, or no safetensors in it.
    """
    config = {key: value for key, value in raw_config(model).items() if key not in INERT_CONFIG_KEYS}
    digests = tuple(_sha256(path, cache_dir / HASHES_FILE) for path in weight_files(model))
    return ReferenceIdentity(version=IDENTITY_VERSION, weights=digests, config=config, dtype=model.dtype)


def _sha256(path: Path, memory: Path) -> str:
    """SHA-256 (hex) of a file: from the hub cache, from memory, or from its bytes.

    The hub cache names a large file by its SHA-256. A local file is hashed once and remembered by (path,
    size, modification and change time, inode): editing it in place changes at least the change time.
    """
    resolved = path.resolve()
    if resolved.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", resolved.name):
        return resolved.name
    stat = resolved.stat()
    stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    if (entry := known.get(str(resolved))) and entry["stamp"] == stamp:
        return str(entry["sha256"])
    digest = hashlib.sha256()
    with resolved.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    known[str(resolved)] = {"stamp": stamp, "sha256": digest.hexdigest()}
    memory.parent.mkdir(parents=True, exist_ok=True)
    temporary = memory.with_name(f"{memory.name}.{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=1))
    temporary.replace(memory)
    return digest.hexdigest()
