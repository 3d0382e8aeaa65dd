"""torchvision and timm models as they are, at 64–128 pixels with ten classes, where both can be imported.

torchvision's wheel carries CUDA operators; on a CPU build of torch its import needs two of their schemas
to exist (no kernel: nothing here calls them), and transformers imports torchvision where it finds it.
Without torchvision and timm the tables are empty.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from .parts import CLASSES, Factory, image

HERE = all(importlib.util.find_spec(name) is not None for name in ("torchvision", "timm"))
_operators = torch.library.Library("torchvision", "FRAGMENT")  # kept alive: schemas go with their library


def importable() -> None:
    """Define `torchvision::nms` and `qnms` where the compiled extension does not load."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            _operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _torchvision(name: str, size: int = 64, **settings: Any) -> Factory:
    def build() -> tuple[nn.Module, Any]:
        import torchvision

        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **settings), image(size)

    return build


def _video(name: str) -> Factory:
    """Eight frames of 32 × 32."""

    def build() -> tuple[nn.Module, Any]:
        import torchvision

        clip = torch.randn(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(1))
        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES), (clip,)

    return build


def _timm(name: str, size: int = 64, **settings: Any) -> Factory:
    def build() -> tuple[nn.Module, Any]:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=CLASSES, **settings), image(size)

    return build


TORCHVISION: dict[str, Factory] = {
    f"tv_{name}": _torchvision(name)
    for name in (
        *("alexnet", "resnet18", "resnet50", "resnext50_32x4d", "densenet121"),
        *("squeezenet1_1", "shufflenet_v2_x0_5", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
        *(
            "efficientnet_v2_s",
            "regnet_x_400mf",
            "regnet_y_400mf",
            "mnasnet0_5",
            "convnext_tiny",
            "swin_t",
            "swin_v2_t",
        ),
    )
} | {
    "tv_googlenet": _torchvision("googlenet", aux_logits=False, init_weights=False),
    "tv_inception_v3": _torchvision("inception_v3", 96, aux_logits=False, init_weights=False),
    "tv_lraspp_mobilenet_v3_large": _torchvision("lraspp_mobilenet_v3_large", weights_backbone=None),
    "tv_r3d_18": _video("r3d_18"),
    "tv_r2plus1d_18": _video("r2plus1d_18"),
    "tv_mc3_18": _video("mc3_18"),
    "tv_swin_t": _torchvision("swin_t", 112),  # 28² tokens: whole windows
    "tv_swin_v2_t": _torchvision("swin_v2_t", 128),
    "tv_vit_b_16": _torchvision("vit_b_16", 64, image_size=64),
    "tv_fcn_resnet50": _torchvision("fcn_resnet50", weights_backbone=None),
    "tv_deeplabv3_mobilenet_v3_large": _torchvision("deeplabv3_mobilenet_v3_large", weights_backbone=None),
}

FREE = (
    *("resnet18", "resnet26d", "resnetv2_50", "resnetv2_50x1_bit", "resnext26ts", "seresnext26t_32x4d"),
    *("seresnet50", "ecaresnet26t", "skresnet18", "resnest14d", "res2net50_26w_4s", "densenet121"),
    *("dpn48b", "dla34", "dla60_res2net", "vovnet39a", "ese_vovnet19b_dw", "cspresnet50"),
    *("cspdarknet53", "cspresnext50", "darknet21", "selecsls42", "hrnet_w18_small", "xception41"),
    *("legacy_xception", "mobilenetv2_050", "mobilenetv3_small_050", "mobilenetv4_conv_small_050"),
    *("mnasnet_small", "efficientnet_b0", "efficientnet_lite0", "efficientnetv2_rw_t", "tinynet_e"),
    *("fbnetc_100", "lcnet_050", "mixnet_s", "ghostnet_050", "ghostnetv2_100", "hardcorenas_a"),
    *("rexnet_100", "repvgg_a0", "repghostnet_050", "regnetx_002", "regnety_002", "regnetz_b16"),
    *("nf_resnet26", "eca_nfnet_l0", "nf_regnet_b0", "convnext_atto", "convnextv2_atto"),
    *("poolformer_s12", "poolformerv2_s12", "convformer_s18", "caformer_s18", "edgenext_xx_small"),
    *("convmixer_768_32", "mobileone_s0", "fastvit_t8", "starnet_s1", "inception_next_tiny"),
    *("fasternet_t0", "lambda_resnet26t", "repvit_m0_9", "tiny_vit_5m_224", "mobilevit_xxs"),
    *("mobilevitv2_050", "shvit_s1", "xcit_nano_12_p16_224", "pvt_v2_b0", "twins_svt_small"),
    *("crossvit_tiny_240", "focalnet_tiny_srf", "davit_tiny", "mvitv2_tiny", "efficientvit_b0"),
    *("efficientvit_m0", "sequencer2d_s"),
)
SIZED = (
    *("visformer_tiny", "botnet26t_256", "efficientformerv2_s0", "vit_tiny_patch16_224"),
    *("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "cait_xxs24_224"),
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "mixer_s32_224", "resmlp_12_224"),
    *("gmlp_ti16_224", "coatnet_nano_rw_224", "maxvit_rmlp_pico_rw_256", "eva02_tiny_patch14_224"),
    *("vit_relpos_small_patch16_224", "volo_d1_224", "levit_128s", "levit_conv_128s", "convit_tiny"),
    *("pit_ti_224", "gcvit_xxtiny", "hiera_tiny_224", "tnt_s_patch16_224", "nest_tiny", "coat_tiny"),
    *("vit_small_r26_s32_224",),
)
TIMM: dict[str, Factory] = {f"timm_{name}": _timm(name) for name in FREE}
TIMM |= {f"timm_{name}": _timm(name, img_size=64) for name in SIZED}
TIMM |= {f"timm_{name}": _timm(name, 128) for name in ("inception_v4", "inception_resnet_v2")}

if HERE:
    importable()
else:
    TORCHVISION, TIMM = {}, {}
