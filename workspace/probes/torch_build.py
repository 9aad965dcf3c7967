"""Import torch for real and say what it is: one JSON object with version, cuda (null without) and
file.
"""

import json
import sys


def main() -> int:
    import torch

    print(
        json.dumps(
            {"version": str(torch.__version__), "cuda": torch.version.cuda, "file": torch.__file__}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
