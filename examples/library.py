"""The library: one long prompt answered in this process, and what was pruned.

Run it with `python examples/library.py`.
"""

from pathlib import Path

from winnow import SamplingParams, Winnow

PROMPT = Path(__file__).with_name("long_prompt.txt").read_text().rstrip()


def main() -> None:
    winnow = Winnow.load(kv_budget=256)  # the embedded model; or a folder, or a hub id
    stream = winnow.stream(PROMPT, SamplingParams(max_tokens=16, temperature=0))
    for piece in stream:
        print(piece, end="", flush=True)
    report = stream.report
    print(f"\nselected after layer {report.selection_layer}")
    print(f"{report.num_selected_tokens:,} of {report.num_prompt_tokens:,} tokens went on")
    print(f"{report.kv_bytes_kept / report.kv_bytes_full:.0%} of the KV cache was kept")


if __name__ == "__main__":
    main()
