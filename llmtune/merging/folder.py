"""What a merged folder holds beside weights: the configuration in its new dtype, tokenizer and template of the base."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmtune.errors import ProofError
from llmtune.files import read_json, write_json
from llmtune.model.files.fingerprints import COPIED, leads_outside
from llmtune.model.files.quantization import HOW_QUANTIZED
from llmtune.model.mlp import with_widths


def save_small_files(
    folder: Path, base: Path, dtype: str, original: Path | None = None, wider: PreTrainedModel | None = None
) -> None:
    """Write the configuration with its new dtype, and tokenizer, template and license of the base.

    The configuration is that of the `original`, where the weights are not the base's, with the widths of the `wider`
    model. Raises ProofError for a link out of the base's folder.
    """
    config = _with_dtype(read_json((original or base) / "config.json"), dtype)
    config = with_widths(config, wider) if wider is not None else config
    config = {key: value for key, value in config.items() if key not in HOW_QUANTIZED}
    write_json(folder / "config.json", config if "torch_dtype" in config else {**config, "dtype": dtype})
    for file in {file for pattern in COPIED for file in base.glob(pattern) if file.is_file()}:
        if leads_outside(file, base):
            raise ProofError(f"{file}: is a link to a file outside the base's folder; replace it by the file itself")
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }
