"""OpenAI's own client, streaming. Winnow's options travel in `extra_body`.

Run `winnow serve` in another terminal, `pip install openai`, and then
`python examples/openai_client.py`.
"""

import argparse
from pathlib import Path

from openai import OpenAI

PROMPT = Path(__file__).with_name("long_prompt.txt").read_text().rstrip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    with OpenAI(base_url=parser.parse_args().url, api_key="none") as client:
        model = client.models.list().data[0].id
        with client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"winnow": {"kv_budget": 256, "decode_budget": 512}},
        ) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    print(choice.text, end="", flush=True)
                if chunk.usage is not None:
                    print_usage(chunk.usage.winnow)


def print_usage(done: dict[str, float]) -> None:
    print(f"\nselected after layer {done['selection_layer']}")
    print(f"{done['kv_bytes_kept'] / done['kv_bytes_full']:.0%} of the KV cache was shipped")


if __name__ == "__main__":
    main()
