"""Talk to what a run has trained: `python launch/chat.py RUN [--prompt TEXT]`."""

import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.command_line import readable_errors


def main() -> None:
    with readable_errors("this chat"):
        options = _parser().parse_args()
        from engine.console import quiet_imports, set_up_logging

        set_up_logging()
        with quiet_imports():
            from engine.chat import Chat
        chat = Chat(options.place, options.base, options.trust_remote_code)
        for prompt in _typed() if options.prompt is None else [options.prompt]:
            chat.answer(prompt, options.max_new_tokens, options.temperature)


def _typed():
    import readline  # noqa: F401 (editing and history in input)

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="launch/chat.py", description="Answers of a run's policy; Ctrl-D ends.")
    parser.add_argument("place", metavar="RUN", type=Path, help="a finished run's folder, or an export's")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the recipe's")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest; default: the recipe's")
    parser.add_argument("--base", action="store_true", help="answer as the policy did before training")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model brings, if its recipe asks for it"
    )
    return parser


if __name__ == "__main__":
    main()
