"""Published TeaCache polynomials: what each model's authors or porters fitted.

Coefficients have the highest power first. Sources: the scripts of ali-vilab/TeaCache (July 2025), and where ``source``
says so ComfyUI-TeaCache, vLLM-Omni and LightX2V. ``thresholds`` are those published, mildest first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.passes.steps.retained import Retained

_ENDS = Retained(first=1, last=1)
_EARLY = Retained(first=5, last=0)
_TIME = "time-embedding"


@dataclass(frozen=True)
class Published:
    """``signal`` and ``retained`` as the reference script of the model has them, counted in calls of one branch."""

    coefficients: tuple[float, ...]
    thresholds: tuple[float, ...]
    signal: str = "modulated"
    retained: Retained = _ENDS
    source: str = "ali-vilab/TeaCache"


_FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
_COGVIDEOX_5B = (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339)
_LUMINA = (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344)

MODELS: Mapping[str, Published] = {
    "flux": Published(_FLUX, (0.25, 0.4, 0.6, 0.8)),
    "tangoflux": Published(_FLUX, (0.25, 0.4)),
    "hunyuan-video": Published((733.226126, -401.131952, 67.5869174, -3.14987800, 0.0961237896), (0.1, 0.15)),
    "open-sora-1.2": Published((217.546007, -118.329252, 26.8662585, -0.0459364272, 0.0484426240), (0.1, 0.2)),
    "latte": Published((-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402), (0.1, 0.2)),
    "open-sora-plan-1.1": Published((205943.668, -14875.9286, 306.085986, 1.31418080, 0.00239658469), (0.1, 0.2)),
    "cogvideox-2b": Published((-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434), (0.1, 0.2), _TIME),
    "cogvideox-5b": Published(_COGVIDEOX_5B, (0.1, 0.2), _TIME),
    "consisid": Published(_COGVIDEOX_5B, (0.1, 0.15, 0.2), _TIME),
    "cogvideox1.5-5b": Published(
        (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703), (0.1, 0.2, 0.3), _TIME
    ),
    "cogvideox1.5-5b-i2v": Published(
        (122.842302, -104.088754, 26.2981677, -0.306009921, 0.0371213220), (0.1, 0.2, 0.3), _TIME
    ),
    "ltx-video-0.9.1": Published((21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326), (0.03, 0.05)),
    "mochi": Published((-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719), (0.06, 0.09)),
    "lumina-next": Published(_LUMINA, (0.2, 0.3, 0.4, 0.5)),
    "lumina2": Published(_LUMINA, (0.2, 0.3, 0.5, 1.1)),
    "lumina2-v2": Published(
        (225.7042019806413, -608.8453716535591, 304.1869942338369, 124.21267720116742, -1.4089066892956552),
        (0.2, 0.3, 0.5, 1.1),
    ),
    "hidream-i1-full": Published(
        (-31360.5009, -712.425503, 49.1363285, 8.26515490, 0.108053901),
        (0.17, 0.25, 0.3, 0.45),
        _TIME,
        Retained(first=1, last=0, share=0.1),
    ),
    "cosmos-7b": Published((271.156237, -91.9775607, 2.24437250, 2.08355751, 0.141776330), (0.3, 0.4)),
    "wan2.1-t2v-1.3b": Published(
        (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774), (0.05, 0.07, 0.08), _TIME
    ),
    "wan2.1-t2v-14b": Published(
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404), (0.14, 0.15, 0.2), _TIME
    ),
    "wan2.1-i2v-480p": Published(
        (-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289), (0.13, 0.19, 0.26), _TIME
    ),
    "wan2.1-i2v-720p": Published(
        (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683), (0.18, 0.2, 0.3), _TIME
    ),
    "wan2.1-t2v-1.3b-ret": Published(
        (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664), (0.05, 0.1), _TIME, _EARLY
    ),
    "wan2.1-t2v-14b-ret": Published(
        (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525), (0.1, 0.2), _TIME, _EARLY
    ),
    "wan2.1-i2v-480p-ret": Published(
        (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977), (0.2, 0.3), _TIME, _EARLY
    ),
    "wan2.1-i2v-720p-ret": Published(
        (8107.05460, 2133.93892, -372.934672, 16.6203073, -0.0417769401), (0.2, 0.3), _TIME, _EARLY
    ),
    "flux-kontext": Published(
        (-1046.55119, 312.563399, -16.9500694, 0.410995971, 0.0374537863), (0.22,), source="ComfyUI-TeaCache"
    ),
    "lumina2-time": Published(
        (-874.643948, 466.059906, -75.1559762, 5.32836175, -0.0327258296), (0.38,), _TIME, source="ComfyUI-TeaCache"
    ),
    "hidream-i1-dev": Published(
        (1.39997273, -4.30130469, 5.01534416, -2.20504164, 0.93942874), (1.0,), _TIME, source="ComfyUI-TeaCache"
    ),
    "hidream-i1-fast": Published(
        (2.26509623, -6.88864563, 7.61123826, -3.10849353, 0.99927602), (1.5,), _TIME, source="ComfyUI-TeaCache"
    ),
    "qwen-image": Published((-450.0, 280.0, -45.0, 3.2, -0.02), (0.2,), source="vLLM-Omni, rounded by hand"),
    "hunyuan-video-1.5-480p": Published(
        (-29719.0924, 22283.4983, -4374.18360, 339.340251, -10.1365855, 0.129101768),
        (0.15,),
        source="LightX2V, degree 5",
    ),
    "minimax-h3": Published(
        (2283.704, -777.598, 94.084, -4.2327, 0.21738), (0.2,), source="vLLM-Omni, a fit with R^2 = 0.095"
    ),
}
