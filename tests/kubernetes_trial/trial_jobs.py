"""The Jobs of the trial: k8s/cpu with the image under test, and a name, a run and an export of their own."""

import json
import os
from pathlib import Path

from tests.kubernetes_trial.kubectl import Kubectl

K8S = Path(__file__).parents[2] / "k8s"
SETTINGS = ("train.epochs=3", "train.checkpoint_every=100")


class TrialJobs:
    """Writes kustomizations into a folder, and applies them."""

    def __init__(self, kubectl: Kubectl, image: str, folder: Path) -> None:
        self.kubectl, self.folder = kubectl, folder
        self._image, _, self._tag = image.rpartition(":") if ":" in image.rpartition("/")[2] else (image, "", "latest")

    def storage_and_data(self) -> str:
        """Create the volume and the data set; return the name of the Job that makes the data."""
        self._apply("storage", "cpu/storage")
        self._apply("data", "cpu/data")
        return "mlet-data"

    def train(self, name: str, *settings: str) -> tuple[str, str]:
        """Start to train; return the names of the Jobs that train and export, of which the second is suspended."""
        words = [*SETTINGS, *settings, f"run.dir=/storage/runs/{name}"]
        patches = [
            {
                "target": {"kind": "Job", "name": job},
                "patch": json.dumps([{"op": "add", "path": f"{_CONTAINER}/args/-", "value": word} for word in more]),
            }
            for job, more in (("mlet-train", words), ("mlet-export", [*words, f"--export=/storage/exports/{name}"]))
        ]
        self._apply(name, "cpu", nameSuffix=f"-{name}", patches=patches)
        return f"mlet-train-cpu-{name}", f"mlet-export-cpu-{name}"

    def _apply(self, name: str, kustomization: str, **more: object) -> None:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        images = [{"name": "mlet-dist-cpu", "newName": self._image, "newTag": self._tag}]
        content = {"resources": [os.path.relpath(K8S / kustomization, folder)], "images": images, **more}
        content |= {"namespace": self.kubectl.namespace}
        (folder / "kustomization.yaml").write_text(json.dumps(content))  # JSON is YAML
        self.kubectl.run("apply", "--kustomize", str(folder))


_CONTAINER = "/spec/template/spec/containers/0"
