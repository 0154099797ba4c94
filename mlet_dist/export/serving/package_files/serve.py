"""Answer a request in plain Python, with torch and fbgemm_gpu alone.

    python serve.py                # answers example_request.json and compares the result with the answer in the file
    python serve.py request.json   # prints {"probability": [...]}

README.md describes the format of a request; example_request.json is one. A request {"rows": [{"I1": 3}, ...]} holds raw
rows, which the directory preprocessing/, beside that of the package, turns into the inputs of the model.
"""

import json
import sys
from pathlib import Path

import fbgemm_gpu  # noqa: F401  # registers the operators that the model calls
import torch

PACKAGE = Path(__file__).resolve().parent
PREPROCESSING = PACKAGE.parent / "preprocessing"


def tensors_of(request: dict) -> list[torch.Tensor]:
    """Return the arguments of the model; raise ValueError if a raw row is invalid."""
    if "rows" in request:
        sys.path.insert(0, str(PREPROCESSING))
        from raw_rows import RawRows

        return list(RawRows(PREPROCESSING).tensors(request["rows"]))
    tensors = [
        torch.tensor(request["dense"], dtype=torch.float32),
        torch.tensor(request["ids"], dtype=torch.int64),
        torch.tensor(request["lengths"], dtype=torch.int64),
    ]
    if "weights" in request:
        tensors.append(torch.tensor(request["weights"], dtype=torch.float32))
    return tensors


def predict(model: torch.jit.ScriptModule, request: dict) -> torch.Tensor:
    """Return the probabilities, ``(rows,)`` or ``(rows, labels)``; raise torch.jit.Error or ValueError."""
    tensors = tensors_of(request)
    with torch.inference_mode():
        return model(*tensors)


def main() -> int:
    """Return the exit code: 1 if the request is invalid or the example's answer is different, else 0."""
    model = torch.jit.load(PACKAGE / "model.pt")
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE / "example_request.json"
    request = json.loads(path.read_text(encoding="utf-8"))
    try:
        found = predict(model, request)
    except (torch.jit.Error, ValueError) as error:
        print(str(error).strip().splitlines()[-1], file=sys.stderr)
        return 1
    print(json.dumps({"probability": found.tolist()}))
    if len(sys.argv) > 1:
        return 0
    expected = torch.tensor(request["probability"])
    difference = float((found - expected).abs().max())
    print(f"largest difference from the example's answer: {difference:.1e}", file=sys.stderr)
    return 0 if difference <= 1e-6 else 1


if __name__ == "__main__":
    sys.exit(main())
