"""Draws a scan order: ``python -m genssm.scan_orders --order zigzag --grid 16x24 --out zigzag.png``."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from genssm.errors import cli
from genssm.scan_orders import NUM_PATHS, ORDERS, VIDEO_ORDERS, get_order, step_distances
from genssm.scan_orders.draw import draw


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m genssm.scan_orders",
        description="Draw the order in which a layer visits the tokens of a grid, and measure how far it jumps.",
        epilog="example: python -m genssm.scan_orders --order hilbert --grid 16x24 --out hilbert.png",
    )
    parser.add_argument("--list", action="store_true", help="list the orders and stop")
    parser.add_argument("--order", metavar="NAME", help="order, such as zigzag; see --list")
    parser.add_argument("--grid", default="16x16", metavar="HxW", help="rows x columns, or frames x rows x columns")
    parser.add_argument("--path", type=int, default=0, metavar="K", help="which path of the order (default 0)")
    parser.add_argument(
        "--window", type=int, metavar="SIDE", help="side of the windows of the order 'local' (default 4)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="picture to write; without it, only measure")
    parser.add_argument("--force", action="store_true", help="replace FILE.png if it exists")
    return parser


def parse_grid(text: str) -> tuple[int, ...]:
    """'16x24' -> (16, 24); '8x16x24' -> (8, 16, 24), frames first."""
    if not re.fullmatch(r"[1-9]\d*([xX×][1-9]\d*){1,2}", text):
        raise ValueError(f"--grid is {text!r}; give rows x columns such as 16x24, or frames x rows x columns: 8x16x24")
    return tuple(int(side) for side in re.split("[xX×]", text))


def list_orders() -> None:
    for heading, orders in (("images: HxW", ORDERS), ("video: FxHxW", VIDEO_ORDERS)):
        print(heading)
        for name, function in orders.items():
            summary = getattr(function, "func", function).__doc__.splitlines()[0]
            options = "".join(f" With {option}." for option in getattr(function, "keywords", ()))
            print(f"  {name:28} {NUM_PATHS[name]:2} paths  {summary}{options}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.list:
        list_orders()
        return 0
    if args.order is None:
        raise ValueError("no order given; pass --order NAME, or --list to see the names")
    sides = parse_grid(args.grid)
    function = get_order(args.order, video=len(sides) == 3)
    if not 0 <= args.path < NUM_PATHS[args.order]:
        raise ValueError(f"order {args.order!r} has the paths 0..{NUM_PATHS[args.order] - 1}, got --path {args.path}")
    if args.window is not None and args.order != "local":
        raise ValueError(f"--window belongs to the order 'local', not to {args.order!r}")
    if args.out is not None:
        _check_target(args.out, args.force)
    order = function(*sides, args.path, **({} if args.window is None else {"window": args.window}))

    title = f"{args.order}, path {args.path} of {NUM_PATHS[args.order]}"
    caption = f"{args.grid}, {order.numel()} token{'s' if order.numel() > 1 else ''}"
    if order.numel() > 1:
        steps = step_distances(order, *sides)
        caption += f", mean grid distance {steps.float().mean():.3f}, longest step {int(steps.max())}"
    if args.out is not None:
        draw(order, sides, title, caption).save(args.out)
    print(f"{title}: {caption}" + (f" -> {args.out}" if args.out else ""))
    return 0


def _check_target(path: Path, force: bool) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out is {str(path)!r}; pictures are written as .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} of --out does not exist; make it first")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; pass --force to replace it")


if __name__ == "__main__":
    cli(main)
