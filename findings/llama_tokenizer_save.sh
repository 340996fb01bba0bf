#!/usr/bin/env bash
# transformers 5.24.0, LlamaTokenizer: a folder whose tokenizer_config.json says "legacy": true, as conversions of older
# Llama and Vicuna weights do, tokenizes otherwise once it has been loaded and saved: `legacy` is not among the saved
# settings, and loading takes its absence for false, so the word after a special token loses its blank. A model that is
# fine-tuned in one process and saved is then asked with other ids than it was trained on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 2>/dev/null
cd "$work"
venv/bin/python -W ignore - 2>/dev/null <<'PY'
import json
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

letters = [chr(code) for code in range(97, 123)]
pieces = ["<unk>", "<s>", "</s>", "▁", *letters, *(f"▁{letter}" for letter in letters)]
merges = [("▁", letter) for letter in letters]
made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
made.decoder = decoders.Metaspace()
made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
seen = {}
for legacy in (True, False):
    source, copy = Path(f"source-{legacy}"), Path(f"copy-{legacy}")
    source.mkdir()
    made.save(str(source / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True, "legacy": legacy}))
    first = AutoTokenizer.from_pretrained(source)
    first.save_pretrained(copy)
    again = AutoTokenizer.from_pretrained(copy)
    seen[legacy] = [tokenizer.tokenize("a</s>b")[-1] for tokenizer in (first, again)]
    kept = json.loads((copy / "tokenizer_config.json").read_text()).get("legacy")
    print("transformers", transformers.__version__, "legacy", legacy, "saved as", kept, "b is", *seen[legacy])
    assert kept is None
assert seen == {True: ["▁b", "b"], False: ["b", "b"]}
PY
