"""The zoo holds every mixture of experts in the installed transformers: found in the library's source, not listed."""

from pathlib import Path

import pytest
import torch
import transformers
from zoo.build import ALL
from zoo.census import Sign, scan, signs_in

torch.set_num_threads(1)

_BOXES = "top-k of boxes, of an object detector"
_POINTS = "top-k of points, in a loss"
_ANSWERS = "top-k of answer spans or of beams, after the model"
_ATTENTION = "top-k of positions, in the attention"

# Packages with a sign of experts, routers or top-k that route no token to an expert.
NO_EXPERTS = {
    "autoformer": _ATTENTION,
    "bamba": "num_experts is a local that is always 1",
    "d_fine": _BOXES,
    "deformable_detr": _BOXES,
    "deimv2": _BOXES,
    "embedding_gemma2": "its configuration names gemma4's towers of images and sound, which are dense",
    "eomt": _POINTS,
    "eomt_dinov3": _POINTS,
    "esm": "a gate multiplies; nothing is chosen",
    "flaubert": _ANSWERS,
    "gemma3n": "the modality router mixes all streams of a token (AltUp); nothing is chosen",
    "gemma4_assistant": "its configuration refuses gemma4_text with enable_moe_block; top-k of groups of token ids",
    "gemma4_unified_assistant": "top-k of groups of token ids, at the output",
    "granite_docling": "the density router is one number for an image; its field router_logits holds that",
    "grounding_dino": _BOXES,
    "informer": _ATTENTION,
    "kyutai_speech_to_text": "a gated MLP; nothing is chosen",
    "lw_detr": _BOXES,
    "mask2former": _POINTS,
    "mm_grounding_dino": _BOXES,
    "moshi": "a gated MLP; nothing is chosen",
    "omdet_turbo": _BOXES,
    "oneformer": _POINTS,
    "patchtsmixer": "gated attention; nothing is chosen",
    "pi0": "the action expert is a fixed tower for one modality",
    "pp_doclayout_v2": _BOXES,
    "pp_doclayout_v3": _BOXES,
    "pp_doclayout_v4": _BOXES,
    "rag": _ANSWERS,
    "rf_detr": _BOXES,
    "rt_detr": _BOXES,
    "rt_detr_v2": _BOXES,
    "sam3_video": "top-k of masks, of a video segmenter",
    "videomt": _POINTS,
    "vitpose": "a head on vitpose_backbone, which is built",
    "xlm": _ANSWERS,
    "xlnet": _ANSWERS,
}


@pytest.fixture(scope="module")
def signs() -> dict[str, set[Sign]]:
    """The signs of the packages of the installed transformers."""
    return scan(Path(transformers.__file__).parent / "models")


@pytest.fixture(scope="module")
def built() -> set[tuple[str, str]]:
    """The (package, class) of every module of transformers in every build of the zoo."""
    classes = set()
    for build in ALL.values():
        for module in build.make().modules():
            path = type(module).__module__.split(".")
            if path[:2] == ["transformers", "models"]:
                classes.add((path[2], type(module).__name__))
    return classes


def test_every_class_of_experts_is_in_a_build(signs: dict[str, set[Sign]], built: set[tuple[str, str]]) -> None:
    found = {(package, sign.name) for package, seen in signs.items() for sign in seen if sign.kind == "experts"}
    # transformers 5.23 has 73 classes; a scan that finds few has lost its sight.
    assert len(found) >= 70
    assert found - built == set(), f"{len(found & built)} of {len(found)} classes of experts are built"


def test_every_package_with_a_sign_of_experts_is_built_or_excluded(
    signs: dict[str, set[Sign]], built: set[tuple[str, str]]
) -> None:
    packages = {package for package, _ in built}
    open_questions = {package: sorted(signs[package]) for package in signs.keys() - packages - NO_EXPERTS.keys()}
    assert open_questions == {}, (
        f"{len(signs.keys() & packages)} built and {len(signs.keys() & NO_EXPERTS.keys())} excluded of {len(signs)} "
        "packages: add the others to the zoo, or to NO_EXPERTS with the reason"
    )


def test_no_excluded_package_holds_experts_or_is_built(
    signs: dict[str, set[Sign]], built: set[tuple[str, str]]
) -> None:
    packages = {package for package, _ in built}
    for package in NO_EXPERTS:
        kinds = {sign.kind for sign in signs.get(package, set())}
        assert kinds, f"{package} has no sign of experts: it needs no exclusion"
        assert not kinds & {"experts", "sized"}, f"{package} holds {sorted(signs[package])}"
        assert package not in packages, f"{package} is excluded and built"


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("@use_experts_implementation\nclass A(nn.Module): pass", {"experts", "word"}),
        ("@use_experts_implementation(has_bias=True)\nclass A(nn.Module): pass", {"experts", "word"}),
        ("class TinyMoe(nn.ModuleList): pass", {"experts", "word"}),
        ("class A:\n def f(self, n):\n  self.experts = nn.ModuleList([B() for _ in range(n)])", {"experts", "word"}),
        (
            "class A:\n def f(self, c):\n  self.w = nn.Parameter(torch.empty(c.num_experts, 4, 8))",
            {"experts", "word"},
        ),
        (
            "class A:\n def f(self, c):\n  self.w = nn.Parameter(torch.empty((c.num_experts, 4, 8)))",
            {"experts", "word"},
        ),
        ("class A:\n def f(self, c):\n  self.r = nn.Linear(4, c.num_experts)", {"sized", "word"}),
        ("class A:\n def f(self, x):\n  return x.topk(2)", {"top-k"}),
        ("class A:\n def f(self, x):\n  return x * self.gating(x)", {"word"}),
        ("class A:\n def f(self, x):\n  'An expert says.'\n  return x", set()),
        ("class A:\n def f(self):\n  self.layers = nn.ModuleList([nn.Linear(4, 8)])", set()),
    ],
)
def test_scan_sees_what_code_is(source: str, kinds: set[str]) -> None:
    assert {sign.kind for sign in signs_in(source)} == kinds


def test_scan_finds_a_wrapper_by_the_model_type_in_its_configuration(tmp_path: Path) -> None:
    files = {
        "tiny_moe/modeling_tiny_moe.py": "@use_experts_implementation\nclass TinyExperts(nn.Module): pass",
        "tiny_moe/configuration_tiny_moe.py": "class TinyConfig:\n    model_type = 'tiny_moe_text'",
        "tiny_vlm/configuration_tiny_vlm.py": "class VlmConfig:\n    text = Spec(model_type='tiny_moe_text')",
        "dense/configuration_dense.py": "class DenseConfig:\n    model_type = 'dense'",
    }
    for path, source in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    signs = scan(tmp_path)
    assert signs.keys() == {"tiny_moe", "tiny_vlm"}
    assert signs["tiny_vlm"] == {Sign("wraps", "tiny_moe_text")}
