"""Answer questions about one text and compute its KV once: for now, for other processes, for next week.

pip install '.[transformers]'     # in a clone of kvstrata
python examples/transformers_prefix.py MODEL FILE QUESTION...

MODEL is the directory (or hub name) of a causal language model, FILE the text. Run it twice.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvstrata.integrations.transformers import PrefixReuse


def main(name: str, file: str, *questions: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = Path(file).read_text("utf-8")

    with PrefixReuse(model, Path.home() / ".cache" / "kvstrata-example") as reuse:
        for question in questions:
            message = {"role": "user", "content": f"{text}\n\nQuestion: {question}"}
            inputs = tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            output = reuse.generate(**inputs, max_new_tokens=32)

            answer = output[0, inputs["input_ids"].shape[1] :]
            print(f"{question}\n  {tokenizer.decode(answer, skip_special_tokens=True).strip()}")
            print(f"  {reuse.last}\n")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
