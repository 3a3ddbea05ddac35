"""Official ToCo checkpoints become ours; files are read safely; misfits are named."""

import pickle
import resource
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wsss.core.errors import WSSSError
from wsss.methods.clustercam import ClusterCAM, ClusterCAMSettings
from wsss.methods.clustercam.official import our_name
from wsss.methods.official import OFFICIAL_NAMES, convert_official, load_official
from wsss.methods.toco import ToCo, ToCoSettings
from wsss.models.backbone import Backbone
from wsss.models.weights import read_state_dict, save_atomically

State = dict[str, Tensor]


def official_shapes(
    *, dim: int, depth: int, num_classes: int, channels: int = 512, grid: int = 14
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official checkpoint, from toco.md section 1."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.cls_token": (1, 1, dim),
        "encoder.pos_embed": (1, 1 + grid * grid, dim),
        "encoder.patch_embed.proj.weight": (dim, 3, 16, 16),
        "encoder.patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        block = f"encoder.blocks.{i}"
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            shapes[f"{block}.{name}.weight"] = (rows, columns)
            shapes[f"{block}.{name}.bias"] = (rows,)
        for norm in ("norm1", "norm2"):
            shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (dim,)
    shapes["encoder.norm.weight"] = shapes["encoder.norm.bias"] = (dim,)
    shapes["encoder.head.weight"], shapes["encoder.head.bias"] = (1000, dim), (1000,)
    shapes["classifier.weight"] = shapes["aux_classifier.weight"] = (num_classes, dim, 1, 1)
    shapes["decoder.conv6.weight"] = (channels, dim, 3, 3)
    shapes["decoder.conv7.weight"] = (channels, channels, 3, 3)
    shapes["decoder.conv8.weight"] = (num_classes + 1, channels, 1, 1)
    for head in ("proj_head", "proj_head_t"):
        for layer, rows, columns in ((0, 2048, dim), (2, 2048, 2048), (4, 256, 2048)):
            shapes[f"{head}.mlp.{layer}.weight"] = (rows, columns)
            shapes[f"{head}.mlp.{layer}.bias"] = (rows,)
        shapes[f"{head}.last_layer.weight_g"] = (1024, 1)
        shapes[f"{head}.last_layer.weight_v"] = (1024, 256)
    return shapes


def tiny_state() -> State:
    """A small official checkpoint whose every entry can be told from every other one."""
    state = {}
    for name, shape in official_shapes(dim=48, depth=2, num_classes=4, channels=16, grid=4).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        state[name] = torch.randn(shape, generator=generator)
    return state


def tiny_module() -> ToCo:
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 96},
    )
    settings = ToCoSettings(max_steps=10, aux_layer=-2, decoder_channels=16)
    return ToCo(backbone=backbone, num_classes=4, settings=settings).eval()


def test_vit_base_has_the_official_number_of_parameters() -> None:
    shapes = official_shapes(dim=768, depth=12, num_classes=20)
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert sum(value.numel() for value in state.values()) == 105_625_320
    converted, _ = convert_official("toco", state)
    ours = sum(value.numel() for value in converted.values())
    assert ours == 105_625_320 - 1000 * 768 - 1000


@pytest.mark.slow
def test_our_vit_base_module_has_exactly_these_parameters() -> None:
    backbone = Backbone(name="vit_base_patch16_224", weights="random")
    module = ToCo(backbone=backbone, num_classes=20, settings=ToCoSettings(max_steps=1))
    converted, _ = convert_official(
        "toco",
        {
            name: torch.empty(shape, device="meta")
            for name, shape in official_shapes(dim=768, depth=12, num_classes=20).items()
        },
    )
    own = {name: value.shape for name, value in module.state_dict().items()}
    assert own == {name: value.shape for name, value in converted.items()}


def test_every_parameter_lands_where_it_belongs() -> None:
    state, module = tiny_state(), tiny_module()
    load_official("toco", module, state, "official.pth")
    own = module.state_dict()
    for official, ours in (
        ("encoder.cls_token", "backbone.vit.cls_token"),
        ("encoder.pos_embed", "backbone.vit.pos_embed"),  # the grid follows the file: 4, not 6
        ("encoder.blocks.1.attn.qkv.bias", "backbone.vit.blocks.1.attn.qkv.bias"),
        ("classifier.weight", "classifier.weight"),
        ("aux_classifier.weight", "aux_classifier.weight"),
        ("decoder.conv8.weight", "decoder.conv8.weight"),
        ("proj_head.mlp.2.weight", "ctc_student.mlp.2.weight"),
        ("proj_head_t.mlp.2.weight", "ctc_teacher.mlp.2.weight"),
        (
            "proj_head.last_layer.weight_g",
            "ctc_student.last_layer.parametrizations.weight.original0",
        ),
        (
            "proj_head_t.last_layer.weight_v",
            "ctc_teacher.last_layer.parametrizations.weight.original1",
        ),
    ):
        assert torch.equal(own[ours], state[official]), official
    # the weight norm works with what was loaded: g v / |v|
    v, g = state["proj_head.last_layer.weight_v"], state["proj_head.last_layer.weight_g"]
    torch.testing.assert_close(
        module.ctc_student.last_layer.weight, g * v / v.norm(dim=1, keepdim=True)
    )
    assert not module.backbone.vit.pos_embed.requires_grad
    assert module(torch.randn(1, 3, 64, 48)).seg_logits.shape == (1, 5, 4, 3)


def test_prefixes_and_leftovers_of_older_files() -> None:
    plain, prefixed = tiny_module(), tiny_module()
    state = tiny_state()
    load_official("toco", plain, state, "a")
    older = {f"module.{name}": value for name, value in state.items()}
    older["module.conv.weight"] = older["module.aux_conv.weight"] = torch.zeros(1)
    load_official("toco", prefixed, older, "b")
    other = prefixed.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in plain.state_dict().items())


def without(name: str) -> Callable[[State], object]:
    return lambda state: state.pop(name)


def with_(name: str, value: Tensor) -> Callable[[State], object]:
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("decoder.conv6.weight"), r"missing 1: decoder\.conv6\.weight"),
        (without("encoder.blocks.0.norm1.bias"), r"missing 1: encoder\.blocks\.0\.norm1\.bias"),
        (without("encoder.pos_embed"), r"missing 1: encoder\.pos_embed"),
        (with_("encoder.blocks.2.norm1.bias", torch.zeros(48)), r"extra 1: encoder\.blocks\.2"),
        (with_("surplus.weight", torch.zeros(1)), r"extra 1: surplus\.weight"),
        (
            with_("proj_head.last_layer.weight_g", torch.ones(1024)),
            r"misshapen 1: proj_head\.last_layer\.weight_g \(expected \(1024, 1\), got \(1024,\)\)",
        ),
        (
            with_("classifier.weight", torch.ones(20, 48, 1, 1)),
            r"misshapen 1: classifier\.weight",
        ),
        (
            with_("encoder.pos_embed", torch.zeros(1, 17, 64)),
            r"misshapen 1: encoder\.pos_embed \(expected \(1, 37, 48\), got \(1, 17, 64\)\)",
        ),
    ],
)
def test_misfits_are_named_as_in_the_file_and_nothing_changes(
    change: Callable[[State], object], message: str
) -> None:
    state, module = tiny_state(), tiny_module()
    change(state)
    before = module.classifier.weight.clone()
    with pytest.raises(WSSSError, match=message) as caught:
        load_official("toco", module, state, "official.pth")
    assert str(caught.value).startswith("official.pth: keys do not fit")
    assert "\n" not in str(caught.value)
    assert torch.equal(module.classifier.weight, before)


def test_missing_keys_have_their_official_names() -> None:
    state, module = tiny_state(), tiny_module()
    del state["proj_head_t.last_layer.weight_v"]
    with pytest.raises(WSSSError, match=r"missing 1: proj_head_t\.last_layer\.weight_v"):
        load_official("toco", module, state, "official.pth")


def test_unknown_method_is_refused() -> None:
    known = "no converter for method 'nope'; known: clustercam, getam, mctformer, more, toco"
    with pytest.raises(WSSSError, match=known):
        convert_official("nope", {})


# ---- ClusterCAM ---------------------------------------------------------------------------------


def clustercam_shapes(
    *, dim: int, depth: int, heads: int, num_classes: int, channels: int = 512, grid: int = 14
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an official checkpoint, from clustercam.md section 1."""
    features = dim + depth * heads * num_classes
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, num_classes, dim),
        "pos_embed": (1, num_classes + grid * grid, dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (num_classes, features, 3, 3),
        "head.bias": (num_classes,),
        "decoder.conv6.weight": (channels, features, 3, 3),
        "decoder.conv7.weight": (channels, channels, 3, 3),
        "decoder.conv8.weight": (num_classes + 1, channels, 1, 1),
    }
    for i in range(depth):
        for name, rows, columns in (
            ("st_attn.qkv", 3 * dim, dim),
            ("st_attn.proj", dim, dim),
            ("st_attn.proj_st", dim, dim),
            ("st_attn.qkv_stsa", 3 * dim, dim),
            ("st_attn.proj_cls", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
        for name in ("st_attn.ln_pat", "st_attn.ln_pat2", "st_attn.ln_cls", "st_attn.ln_st"):
            shapes[f"blocks.{i}.{name}.weight"] = shapes[f"blocks.{i}.{name}.bias"] = (dim,)
        shapes[f"blocks.{i}.norm2.weight"] = shapes[f"blocks.{i}.norm2.bias"] = (dim,)
        shapes[f"blocks.{i}.st_attn.mix_param"] = (1,)
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]]) -> State:
    """Parameters of these shapes, every entry different from every other one."""
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        for name, shape in shapes.items()
    }


TINY_CLUSTERCAM = {"dim": 48, "depth": 2, "heads": 3, "num_classes": 4, "channels": 16}


def tiny_clustercam() -> ClusterCAM:
    backbone = Backbone(
        name="vit_tiny_patch16_224",
        weights="random",
        overrides={"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 96},
    )
    settings = ClusterCAMSettings(max_steps=1, decoder_channels=16)
    return ClusterCAM(backbone=backbone, num_classes=4, settings=settings).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("num_classes", "count"), [(20, 41_681_696), (80, 65_760_476)])
def test_clustercam_has_the_official_number_of_parameters(num_classes: int, count: int) -> None:
    shapes = clustercam_shapes(dim=384, depth=12, heads=6, num_classes=num_classes)
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    assert sum(value.numel() for value in state.values()) == count
    converted, _ = convert_official("clustercam", state)
    backbone = Backbone(name="deit_small_patch16_224", weights="random")
    settings = ClusterCAMSettings(max_steps=1)
    module = ClusterCAM(backbone=backbone, num_classes=num_classes, settings=settings)
    own = {name: value.shape for name, value in module.state_dict().items()}
    assert own == {name: value.shape for name, value in converted.items()}
    assert sum(p.numel() for p in module.parameters()) == count


@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_clustercam_parameter_lands_where_it_belongs(prefix: str, tmp_path: Path) -> None:
    state, module = random_state(clustercam_shapes(**TINY_CLUSTERCAM)), tiny_clustercam()
    torch.save({"model": {prefix + name: v for name, v in state.items()}}, tmp_path / "a.pth")
    load_official("clustercam", module, read_state_dict(tmp_path / "a.pth"), "a.pth")
    own = module.state_dict()
    assert len(own) == len(state), "every official key is consumed"
    for official, value in state.items():
        ours = our_name(official)
        assert ours is not None
        assert torch.equal(own[ours], value), official
        assert OFFICIAL_NAMES["clustercam"](ours) == official
    block = module.backbone.vit.blocks[1]
    assert torch.equal(block.norm1.weight, state["blocks.1.st_attn.ln_pat.weight"])
    assert torch.equal(module.branches[1].norm_space.bias, state["blocks.1.st_attn.ln_pat2.bias"])
    assert torch.equal(module.branches[0].mixing, state["blocks.0.st_attn.mix_param"])
    assert module.backbone.vit.pos_embed.shape == (1, 4 + 196, 48)  # the file's grid, not 6 x 6
    assert module.backbone.vit.pos_embed.requires_grad
    assert module(torch.randn(1, 3, 64, 48)).seg_logits.shape == (1, 5, 4, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("head.bias"), r"missing 1: head\.bias$"),
        (
            without("blocks.1.st_attn.proj_st.bias"),
            r"missing 1: blocks\.1\.st_attn\.proj_st\.bias$",
        ),
        (without("pos_embed"), r"missing 1: pos_embed$"),
        (with_("blocks.2.norm2.bias", torch.zeros(48)), r"extra 1: blocks\.2\.norm2\.bias$"),
        (with_("blocks.0.norm1.bias", torch.zeros(48)), r"extra 1: blocks\.0\.norm1\.bias$"),
        (
            with_("cls_token", torch.zeros(1, 20, 48)),
            r"misshapen 1: cls_token \(expected \(1, 4, 48\), got \(1, 20, 48\)\)$",
        ),
    ],
)
def test_clustercam_misfits_are_named_as_in_the_file(
    change: Callable[[State], object], message: str
) -> None:
    state, module = random_state(clustercam_shapes(**TINY_CLUSTERCAM)), tiny_clustercam()
    change(state)
    with pytest.raises(WSSSError, match=message):
        load_official("clustercam", module, state, "official.pth")


# ---- reading files -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_torch_files_are_read(tmp_path: Path, wrapper: str | None) -> None:
    state = {"a": torch.arange(3.0)}
    torch.save({wrapper: state} if wrapper else state, tmp_path / "a.pth")
    assert torch.equal(read_state_dict(tmp_path / "a.pth")["a"], state["a"])


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0)}, tmp_path / "a.safetensors")
    assert read_state_dict(tmp_path / "a.safetensors")["a"].tolist() == [0, 1, 2]


class Bomb:
    """Runs a command when unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.target,)  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    target, path = tmp_path / "touched", tmp_path / "evil.pth"
    torch.save({"a": torch.zeros(1), "b": Bomb(target)}, path)
    with pytest.raises(WSSSError, match=r"evil\.pth: not a readable checkpoint"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps({"b": Bomb(target)}))
    with pytest.raises(WSSSError, match=r"evil\.pth: not a readable checkpoint"):
        read_state_dict(path)
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 7, 100, 0.5, -1])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut{suffix}"
    state = {"weight": torch.randn(64, 64)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else int(keep)])
    words = rf"cut\{suffix}: (not a readable (checkpoint|\.safetensors file)|is empty|is damaged)"
    with pytest.raises(WSSSError, match=words) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no parameters"),
        ([torch.zeros(1)], "holds no parameters"),
        ({"epoch": 3, "a": torch.zeros(1)}, "entries that are not tensors: epoch"),
    ],
)
def test_files_without_parameters_are_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WSSSError, match=message):
        read_state_dict(tmp_path / "a.pth")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WSSSError, match=r"a\.pth: no such checkpoint"):
        read_state_dict(tmp_path / "a.pth")


def test_a_full_disk_is_named_and_leaves_the_former_file(tmp_path: Path) -> None:
    """Torch itself says "unexpected pos", with neither path nor reason."""
    path, former = tmp_path / "last.ckpt", {"a": torch.zeros(2)}
    save_atomically(former, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(WSSSError) as limited:
            save_atomically({"a": torch.zeros(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (tmp_path / ".last.ckpt.tmp").symlink_to("/dev/full")
    with pytest.raises(WSSSError) as full:
        save_atomically({"a": torch.zeros(10_000)}, path)
    for error, reason in ((limited, "File too large"), (full, "No space left on device")):
        assert str(error.value) == (
            f"{path}: cannot be written ({reason}); a previous file is untouched; make room there, "
            "or choose another folder"
        )
    assert list(tmp_path.iterdir()) == [path]
    assert read_state_dict(path)["a"].tolist() == [0, 0]


def test_a_checkpoint_that_cannot_be_pickled_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_atomically({"a": lambda: None}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())
