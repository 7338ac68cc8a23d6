"""Write the golden arrays that `tests/nn/test_bert.py` and `tests/weights/test_text.py` compare
with.

The transformers library on PyTorch, in float64 on the CPU. Run it in an environment of its own,
never in the tests: `pip install torch transformers`, then `python tests/golden/make_bert_golden.py
FOLDER`, where FOLDER has the `model.safetensors`, `config.json` and `tokenizer.json` of
all-MiniLM-L6-v2. The versions used are stored in each file.

bert_tiny.safetensors   a BERT of random weights under its own tensor names, older LayerNorm names
                        (gamma, beta) and prefix included; plus "golden.token_ids",
                        "golden.token_mask" and "golden.hidden.<i>", the embedding and each block
minilm.npz              "texts", "token_ids", "token_mask", "hidden": the last hidden state
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers import AutoTokenizer, BertConfig, BertModel

HERE = Path(__file__).parent
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
TEXTS = (
    "A bird that sings.",
    "the act of moving through water, as fish do; not to be confused with floating",
    "Größe, 東京, naïve — and numbers: 3.14, 1,000",
)


def tiny() -> None:
    """A BERT with every parameter away from its usual start, so that none can be dropped."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=48,
        max_position_embeddings=12,
        attn_implementation="eager",
    )
    model = BertModel(config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "LayerNorm.weight" in name:
                noise = 1 + 0.3 * noise
            elif parameter.ndim == 2 and "embeddings" not in name:
                noise = 1.5 * noise * parameter.shape[1] ** -0.5
            else:
                noise = 0.3 * noise
            parameter.copy_(noise.float().double())
    ids = torch.randint(0, 50, (4, 10), generator=generator)
    mask = torch.arange(10)[None, :] < torch.tensor([10, 7, 3, 1])[:, None]
    with torch.no_grad():
        found = model(ids, attention_mask=mask.long(), output_hidden_states=True)
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, value in model.state_dict().items():
        for new, old in older.items():
            name = name.replace(new, old)
        tensors[f"bert.{name}"] = value.numpy().astype(np.float32)
    tensors["cls.predictions.bias"] = np.zeros(50, np.float32)
    tensors["golden.token_ids"] = ids.numpy().astype(np.int32)
    tensors["golden.token_mask"] = mask.numpy()
    for index, hidden in enumerate(found.hidden_states):
        tensors[f"golden.hidden.{index}"] = hidden.numpy().astype(np.float32)
    save_file(tensors, HERE / "bert_tiny.safetensors", {"versions": json.dumps(VERSIONS)})


def minilm(folder: str) -> None:
    """The packaged weights on texts of three lengths in one batch."""
    model = BertModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(TEXTS), padding="longest", return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    np.savez_compressed(
        HERE / "minilm.npz",
        texts=np.array(TEXTS),
        token_ids=batch["input_ids"].numpy().astype(np.int32),
        token_mask=batch["attention_mask"].numpy().astype(bool),
        hidden=hidden.numpy().astype(np.float32),
        versions=np.array(json.dumps(VERSIONS)),
    )


if __name__ == "__main__":
    tiny()
    minilm(sys.argv[1])
