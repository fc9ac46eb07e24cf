"""``personmae serve``: a web page for a gallery."""

import argparse
import importlib.util
from pathlib import Path

from personmae.commands.arguments import add_unfinished, place, positive
from personmae.errors import UserError

_SERVE = """\
A web page that searches a gallery: choose an image of it, or upload one and draw a box on it. It shows what was found, which
patches of two images match, and with --pretrained what a model predicts below a mask that the visitor draws.

Other machines cannot reach it unless --host says so, and then a password is required: the first line of --password-file, or
PERSONMAE_SERVE_PASSWORD. Uploads are held in memory while they are worked on, and are never kept.
"""
_NEEDED = ("fastapi", "uvicorn", "python_multipart")


def add_serve(verbs: argparse._SubParsersAction) -> None:
    verb = verbs.add_parser("serve", help="a web page for a gallery", description=_SERVE)
    verb.add_argument("gallery", type=Path, metavar="GALLERY", help="what 'gallery build' made")
    verb.add_argument("--model", type=place, metavar="RUN", help="for uploads (default: what the gallery was built with)")
    verb.add_argument("--pretrained", type=place, metavar="RUN", help="a pre-training run, for reconstructions")
    verb.add_argument("--host", default="127.0.0.1", help="the address to listen at (default 127.0.0.1)")
    verb.add_argument("--port", type=_port, default=8765, help="0 for any that is free (default 8765)")
    verb.add_argument("--password-file", type=Path, metavar="FILE", help="a file whose first line is the password")
    verb.add_argument("--no-password", action="store_true", help="let other machines in without a password")
    verb.add_argument(
        "--max-upload", type=positive, default=10.0, metavar="MB", help="of all images of a search together (default 10)"
    )
    add_unfinished(verb)
    verb.set_defaults(run=_serve)


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 65_536:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text!r}")


def _serve(args: argparse.Namespace) -> None:
    if absent := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"a web server is required, and {absent[0]} is not installed: pip install 'personmae[serve]'")
    from personmae.serve import server

    names = ("gallery", "model", "pretrained", "host", "port", "password_file", "no_password", "unfinished")
    chosen = {name: vars(args)[name] for name in names}
    server.run(server.Settings(**chosen, most_bytes=round(args.max_upload * 1e6)))
