"""The formatter of `--help`, which fills lines to the width of the terminal."""

import argparse
import textwrap
from typing import Any


class HelpFormatter(argparse.HelpFormatter):
    """A formatter that fills each paragraph of a description, and leaves indented paragraphs (examples, formulas) alone."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = text.strip("\n").split("\n\n")
        return "\n\n".join(
            textwrap.indent(block, indent) if block.startswith(" ") else self._filled(block, width, indent)
            for block in blocks
        )

    def _format_usage(self, *arguments: Any) -> str:
        usage = super()._format_usage(*arguments)
        if all(len(line) <= self._width for line in usage.splitlines()):
            return usage
        return self._filled(usage, self._width, "", "  ") + "\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        text = super()._format_action_invocation(action)
        return text if len(text) < self._width else text.replace(" {", "\n      {")  # choices in a line of their own

    def _split_lines(self, text: str, width: int) -> list[str]:
        return self._filled(text, width, "").splitlines()

    @staticmethod
    def _filled(text: str, width: int, indent: str, hanging: str = "") -> str:
        return textwrap.fill(
            " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent + hanging,
            fix_sentence_endings=True, break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
