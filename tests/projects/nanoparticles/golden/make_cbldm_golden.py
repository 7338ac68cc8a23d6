"""Writes cbldm_golden.npz: blocks of the authors' PyTorch code on random weights and inputs.

    git clone https://github.com/hegwj/CbLDM
    python make_cbldm_golden.py CbLDM       # needs torch and einops

Their code (MIT) is run, and none of it is kept. Names of weights are theirs.
"""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

SEED = 0


def randomised(block: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    """The block with normal weights, also where its own start is zero or one."""
    for parameter in block.parameters():
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
        noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data.copy_(noise if parameter.ndim > 1 else noise + 0.5)
    return block.eval()


def main(root: str) -> None:
    sys.path.insert(0, root)
    # Their package imports a file that is not in the repository.
    sys.modules["utils.unet.unet_2"] = ModuleType("utils.unet.unet_2")
    from modules.ldm import cosine_beta_schedule
    from modules.vae4io_pdf import AttnBlock
    from utils.attn.spatialattention import SpatialTransformer
    from utils.unet.unet import ResBlock, timestep_embedding

    generator = torch.Generator().manual_seed(SEED)
    image = torch.randn((2, 8, 4, 4), generator=generator)
    wide = torch.randn((2, 16, 4, 4), generator=generator)
    embedding = torch.randn((2, 12), generator=generator)
    context = torch.randn((2, 3, 10), generator=generator)
    cases = {
        "vae_attention": (AttnBlock(8), image),
        "unet_residual": (ResBlock(16, 12, out_channels=8), wide, embedding),
        "unet_transformer": (SpatialTransformer(8, 2, 4, depth=2, context_dim=10), image, context),
    }
    kept = {"image": image, "wide": wide, "embedding": embedding, "context": context}
    for name, (block, *inputs) in cases.items():
        randomised(block, generator)
        kept[f"{name}.out"] = block(*inputs).detach()
        for path, value in block.state_dict().items():
            kept[f"{name}.{path}"] = value
    levels = torch.tensor([0, 1, 7, 500, 999])
    kept["levels"], kept["level_embedding"] = levels, timestep_embedding(levels, 16)
    kept["beta"] = torch.as_tensor(cosine_beta_schedule(1000))
    out = Path(__file__).with_name("cbldm_golden.npz")
    np.savez_compressed(out, **{name: np.asarray(value) for name, value in kept.items()})
    print(f"{out}: {len(kept)} arrays, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
