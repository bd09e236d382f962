"""The examples run from end to end on the data that they make themselves, and what they say of it holds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torchvision.utils import save_image

import dspfx

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(file.stem for file in FOLDER.glob("*.py"))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the examples export to ONNX: the extra dspfx[onnx]")
    results = example(name).main(["--out", str(tmp_path), "--epochs", "1", "--flops", "0.6"])
    assert 0.55 < results["flops_left"] <= 0.6
    assert results["params_left"] < 0.95
    assert results["lowered_error"] < 1e-4
    assert results["onnx_error"] < 1e-4
    (onnx,) = tmp_path.glob("*.onnx")
    assert sorted(tmp_path.iterdir()) == sorted([onnx, tmp_path / "small.safetensors"])
    printed = capsys.readouterr().out
    assert "ratio to dense" in printed
    assert all(key in printed for key in results)


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_help_names_real_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        example(name).main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "--data" in text or "--images" in text
    assert f"python examples/{name}.py" in text


def test_examples_are_listed_and_marked() -> None:
    page = (FOLDER.parent / "docs" / "examples.md").read_text()
    for name in EXAMPLES:
        text = (FOLDER / f"{name}.py").read_text()
        assert f"examples/{name}.py" in page
        assert text.count("# dspfx") >= 7
        assert all("# dspfx" in line for line in text.splitlines() if "dspfx." in line and "profile(" not in line)


def test_classifier_reads_a_folder_of_images(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / part / kind).mkdir(parents=True)
            save_image(torch.rand(3, 40, 50), tmp_path / part / kind / "0.png")
    module = example("classifier")
    training, testing, classes = module.datasets(module.arguments(["--data", str(tmp_path)]))
    assert (len(training), len(testing), classes) == (2, 2, 2)
    assert training[1][0].shape == testing[1][0].shape == (3, 32, 32)
    assert testing[1][1] == 1


def test_unet_reads_images_and_masks(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    save_image(torch.rand(3, 40, 50), tmp_path / "images" / "a.png")
    save_image(torch.full((1, 40, 50), 2 / 255), tmp_path / "masks" / "a.png")
    image, mask = example("unet").Folder(tmp_path / "images", tmp_path / "masks", 32)[0]
    assert image.shape == (3, 32, 32)
    assert -1 <= float(image.min()) < float(image.max()) <= 1
    assert mask.unique().tolist() == [2]


def test_detector_reads_coco(tmp_path: Path) -> None:
    save_image(torch.rand(3, 40, 50), tmp_path / "a.png")
    notes = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "without.png"}],
        "annotations": [{"image_id": 7, "bbox": [5, 6, 10, 20], "category_id": 3}],
    }
    (tmp_path / "notes.json").write_text(json.dumps(notes))
    data = example("detector").Coco(tmp_path, tmp_path / "notes.json")
    image, target = data[0]
    assert len(data) == 1
    assert image.shape == (3, 40, 50)
    assert target["boxes"].tolist() == [[5, 6, 15, 26]]
    assert target["labels"].tolist() == [3]


def test_a_lowered_detector_detects(tmp_path: Path) -> None:
    """What examples/detector.py calls small is a whole detector."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    model = RetinaNet(backbone, 2, min_size=64, max_size=128)
    small = dspfx.lower(dspfx.prepare(model, [torch.rand(3, 64, 64)]))
    (found,) = small([torch.rand(3, 64, 64)])
    assert isinstance(small, RetinaNet)
    assert found["boxes"].shape[1] == 4
