"""Class names -> text embeddings of SD3, encoded once and saved; with a valid file no text encoder is loaded.

# C classes  L text tokens, 77 of CLIP + max_sequence_length of T5  E text width  D pooled width
"""

import gc
import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from segadapt.errors import UserError
from segadapt.models.checkpoint_errors import explain_checkpoint_errors, local_folder
from segadapt.models.generative.prompt_texts import fill_template, read_prompts

SETTING = "model.generative.checkpoint"
FORMAT = 1
BATCH = 8  # prompts encoded at once
MIB = 2**20
ENCODER_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the generative model is told for each class, and for none; all on the CPU, in one dtype."""

    sequence_CLE: Tensor
    pooled_CD: Tensor
    null_sequence_LE: Tensor  # of the empty prompt
    null_pooled_D: Tensor
    source: str  # "encoded" by the text encoders | "learned" in training

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of all four tensors."""
        digest = hashlib.sha256()
        for tensor in (self.sequence_CLE, self.pooled_CD, self.null_sequence_LE, self.null_pooled_D):
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def prompt_embeddings(
    *,
    classes: Sequence[str],
    dataset_name: str,
    template: str = "a photo of a {}",
    overrides: Mapping[str, str],
    file: str | Path | None = None,
    checkpoint: str,
    revision: str | None,
    max_sequence_length: int = 256,  # T5 tokens; SD3 has no attention mask, so another length changes every result
    dtype: torch.dtype,
    cache_dir: str | Path,
    device: str | torch.device,
) -> PromptEmbeddings:
    """Read the embeddings of these prompts from `cache_dir`, or encode and save them there.

    The file's name shows template, or prompt file, and data set; it ends in a hash of everything the embeddings depend
    on. A stale, foreign or damaged file under that name is rebuilt.

    Args:
        classes: names in label order; surrounding spaces are dropped ('bed ' is in a common ADE20K list).
        template: with one {} for the class name.
        overrides: class name -> its whole prompt, in place of the template.
        file: of every class's whole prompt, see `read_prompts`; in place of both.
        checkpoint: folder (no network) or hub id of a diffusers SD3 pipeline.
        dtype: float32 or bfloat16, of the text encoders and of the result; T5 is wrong in float16.
        device: where the text encoders run, for as long as it takes.
    Raises:
        UserError: bad template, override, prompt file, length or dtype; checkpoint missing, gated or incomplete.
    """
    names = [name.strip() for name in classes]
    prompts = fill_template(names, template, overrides) if file is None else read_prompts(Path(file), names)
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(
            f"model.generative.prompts.dtype={_name(dtype)}; expected float32 or bfloat16: T5 is wrong in float16. "
            f"Choose one of the two."
        )
    if not 1 <= max_sequence_length <= 512:
        raise UserError(
            f"model.generative.prompts.max_sequence_length={max_sequence_length}; expected 1..512 T5 tokens. "
            f"Use 256, as SD3 was trained."
        )
    with explain_checkpoint_errors("generative model", checkpoint, SETTING):
        folder = local_folder(checkpoint, SETTING)
        commit = None if folder else _hub_commit(checkpoint, revision)
        encoders = _folder_hash(folder) if folder else f"{checkpoint}@{commit}"
    facts = {
        "format": FORMAT,
        "source": "encoded",
        "classes": names,
        "dataset": dataset_name,
        "prompts": prompts,
        "model": folder.name if folder else checkpoint,
        "encoders": encoders,
        "max_sequence_length": max_sequence_length,
        "dtype": _name(dtype),
    }
    # without the folder's name: moving a checkpoint does not change its embeddings
    keyed = json.dumps({name: value for name, value in facts.items() if name != "model"}, sort_keys=True)
    key = hashlib.sha256(keyed.encode()).hexdigest()
    told_by = template if file is None else Path(file).stem
    path = Path(cache_dir) / f"{_slug(told_by)}__{_slug(dataset_name)}__{key[:8]}.safetensors"
    if path.is_file():
        try:
            embeddings, found = _read(path)
            if found.get("key") == key and len(embeddings.sequence_CLE) == len(names):
                return embeddings
            reason = "it holds other prompts"
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error)
        log.warning("%s is encoded anew: %s", path, reason)
    with explain_checkpoint_errors("generative model", checkpoint, SETTING):
        embeddings, has_t5 = _encode(
            prompts,
            str(folder or checkpoint),
            revision=commit,
            offline=folder is not None,
            max_sequence_length=max_sequence_length,
            dtype=dtype,
            device=torch.device(device),
        )
    _write(path, embeddings, facts | {"t5": has_t5, "key": key})
    return embeddings


def save_embeddings(
    path: str | Path, embeddings: PromptEmbeddings, *, classes: Sequence[str], dataset_name: str, model: str
) -> None:
    """Write embeddings that were learned (or made by hand) for `load_embeddings`; atomic.

    Args:
        model: what they belong to, in words, for whoever opens the file.
    """
    assert len(classes) == len(embeddings.sequence_CLE) == len(embeddings.pooled_CD), "one row for each class"
    facts = {
        "format": FORMAT,
        "source": embeddings.source,
        "classes": [name.strip() for name in classes],
        "dataset": dataset_name,
        "model": model,
        "dtype": _name(embeddings.sequence_CLE.dtype),
    }
    _write(Path(path), embeddings, facts)


def load_embeddings(path: str | Path, *, classes: Sequence[str]) -> PromptEmbeddings:
    """Read a file of `save_embeddings` or of the cache.

    Raises:
        UserError: no such file, damaged, or made for other classes; the first difference is named.
    """
    try:
        embeddings, facts = _read(Path(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{path}: text embeddings cannot be read ({error}); expected a file written by segadapt. "
            f"Correct the path, or make the file again."
        ) from error
    got, expected = facts["classes"], [name.strip() for name in classes]
    for index in range(max(len(got), len(expected))):
        first = got[index] if index < len(got) else "nothing"
        second = expected[index] if index < len(expected) else "nothing"
        if first != second:
            raise UserError(
                f"{path}: class {index} is {first!r} ({len(got)} classes); the data set expects {second!r} "
                f"({len(expected)} classes). Use the embeddings made for this data set."
            )
    return embeddings


def _encode(
    prompts: Sequence[str],
    source: str,
    *,
    revision: str | None,
    offline: bool,
    max_sequence_length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[PromptEmbeddings, bool]:
    """Embeddings of the prompts and of "", and whether T5 took part; the encoders are freed before it returns."""
    # here, because a run with a valid file must not pay for the pipeline
    from diffusers import __version__
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from packaging.version import Version

    # renamed in diffusers 0.41, where the old name only warns
    dtype_name = "dtype" if Version(__version__) >= Version("0.41") else "torch_dtype"
    where: dict[str, Any] = {"revision": revision, "local_files_only": offline}
    index: Any = StableDiffusion3Pipeline.load_config(source, **where)
    has_t5 = (index.get("text_encoder_3") or [None])[0] is not None
    _check_parts(index, source)
    absent = {"transformer": None, "vae": None} | ({} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None})
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
        source, **absent, **where, **{dtype_name: dtype}, use_safetensors=True
    )
    pipeline.to(device)
    if not has_t5:
        # diffusers puts zeros in T5's place and asks the transformer's config how wide: weightless, it can answer
        config: Any = SD3Transformer2DModel.load_config(source, subfolder="transformer", **where)
        with torch.device("meta"):
            pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(config))
    sequences, pooled = [], []
    everything = [*prompts, ""]
    with torch.no_grad():
        for start in range(0, len(everything), BATCH):
            batch = everything[start : start + BATCH]
            sequence_BLE, _, pooled_BD, _ = pipeline.encode_prompt(
                prompt=batch,
                prompt_2=batch,
                prompt_3=batch,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=max_sequence_length,
            )
            sequences.append(sequence_BLE.to("cpu", dtype))
            pooled.append(pooled_BD.to("cpu", dtype))
    del pipeline
    gc.collect()  # the modules of transformers hold cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return _split(torch.cat(sequences), torch.cat(pooled), source="encoded"), has_t5


def _check_parts(index: Mapping[str, Any], source: str) -> None:
    """UserError: a part of a pipeline that is no class of two libraries: diffusers imports by name what is there."""
    for name, part in index.items():
        library = part[0] if isinstance(part, list | tuple) and part else None
        if library not in (None, "diffusers", "transformers"):
            raise UserError(
                f"{SETTING}={source}: model_index.json takes {name} from {library!r}; expected diffusers or "
                "transformers, as no code of a checkpoint is run. Use a checkpoint of Stable Diffusion 3."
            )


def _split(sequence: Tensor, pooled: Tensor, *, source: str) -> PromptEmbeddings:
    """[C+1, L, E] and [C+1, D], the last row that of the empty prompt, as they are in the file."""
    return PromptEmbeddings(sequence[:-1], pooled[:-1], sequence[-1], pooled[-1], source)


def _write(path: Path, embeddings: PromptEmbeddings, facts: Mapping[str, Any]) -> None:
    """Write beside the final name, sync, rename: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "sequence": torch.cat([embeddings.sequence_CLE, embeddings.null_sequence_LE[None]]).cpu().contiguous(),
        "pooled": torch.cat([embeddings.pooled_CD, embeddings.null_pooled_D[None]]).cpu().contiguous(),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # one entry: safetensors writes several in no fixed order
        save_file(tensors, temporary, metadata={"segadapt": json.dumps(facts, sort_keys=True)})
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> tuple[PromptEmbeddings, dict[str, Any]]:
    """Raises OSError, SafetensorError, or ValueError: no file, damaged, or not one of ours."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("segadapt", "{}"))
        if facts.get("format") != FORMAT or {*file.keys()} != {"sequence", "pooled"}:
            raise ValueError(f"it is not a file of text embeddings of format {FORMAT}")
        sequence, pooled = file.get_tensor("sequence"), file.get_tensor("pooled")
    rows = len(facts["classes"]) + 1
    if sequence.ndim != 3 or pooled.ndim != 2 or len(sequence) != rows or len(pooled) != rows:
        raise ValueError(f"it holds {tuple(sequence.shape)} and {tuple(pooled.shape)} for {rows} prompts")
    return _split(sequence, pooled, source=facts["source"]), facts


def _hub_commit(checkpoint: str, revision: str | None) -> str:
    """The commit of a hub id: as given, else as cached (no network), else as the hub says."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    path = try_to_load_from_cache(checkpoint, "model_index.json", revision=revision)
    if not isinstance(path, str):
        path = hf_hub_download(checkpoint, "model_index.json", revision=revision)
    return Path(path).parent.name  # .../snapshots/<commit>/model_index.json


def _folder_hash(folder: Path) -> str:
    """SHA-256 over every file of the text encoders and tokenizers: name, size, first, middle and last MiB.

    A whole T5-XXL would take ten seconds at every start.
    """
    digest = hashlib.sha256()
    for part in ENCODER_FOLDERS:
        for path in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\n".encode())
            with path.open("rb") as file:
                for start in sorted({0, max(0, size // 2 - MIB // 2), max(0, size - MIB)}):
                    file.seek(start)
                    digest.update(file.read(MIB))
    return f"sha256:{digest.hexdigest()}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:60] or "empty"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
