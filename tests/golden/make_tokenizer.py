"""Make tokenizer.json and tokenizer_cases.json: Wan's own HuggingfaceTokenizer over a small tokenizer of umT5's kind.

umT5's vocabulary is 16 MB, so a Unigram of a few hundred pieces with the same special tokens stands in for it: what
is compared is cleaning, </s>, truncation and padding.  Needs transformers, ftfy, regex and Wan 2.1's checkout
(made with transformers 5.23):  python tests/golden/make_tokenizer.py WAN_CHECKOUT
"""

import importlib.util
import json
import sys

from seeded import GOLDEN
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "A red circle moving right.",
    "  many\t kinds \n\n of\u00a0white\u3000space \x1c here ",
    "&lt;b&gt;escaped&amp;amp;twice&lt;/b&gt; and &amp;nbsp; blanks",
    "mojibake: â€œquotesâ€\x9d, schÃ¶n, ﬁne ligatures, ＦＵＬＬ ｗｉｄｔｈ",
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格",
    "<p> &amp;lt;escaped twice beside a tag, which ftfy leaves alone",
    "unfinished &lt tag, \u200bzero width, e\u0301 combining, 🎬 camera",
    "it is a long sentence " * 12,
    "",
    "   ",
]
TEXT_LEN = 48

backend = Tokenizer(models.Unigram())
backend.pre_tokenizer = pre_tokenizers.Metaspace()
backend.train_from_iterator(
    TEXTS * 3,
    trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    ),
)
backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
backend.save(str(GOLDEN / "tokenizer.json"), pretty=False)

spec = importlib.util.spec_from_file_location("wan_tokenizers", f"{sys.argv[1]}/wan/modules/tokenizers.py")
wan = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wan)
reference = object.__new__(wan.HuggingfaceTokenizer)
reference.tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
)
reference.seq_len, reference.clean = TEXT_LEN, "whitespace"

cases = []
for text in TEXTS:
    ids, mask = reference(text, return_mask=True, add_special_tokens=True)
    cases.append({"text": text, "clean": reference._clean(text), "ids": ids[0].tolist(), "mask": mask[0].tolist()})
(GOLDEN / "tokenizer_cases.json").write_text(json.dumps({"text_len": TEXT_LEN, "cases": cases}) + "\n")
