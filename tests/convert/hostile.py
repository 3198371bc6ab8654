"""Damaged and hostile checkpoints, one for each number, and the child process that feeds them to the converter.

    python tests/convert/hostile.py FIRST LAST SCRATCH

prints one line of JSON: how many were refused, how many read, and every file that did anything else. While a file is
read, an audit hook watches for what no reader does (starting processes, unpickling, compiling code, connecting,
writing outside of the output), 5 s of CPU time are a hang, and 512 MB above the start are the limit of memory.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

GLOBALS = (
    "os system", "posix system", "nt system", "subprocess Popen", "builtins eval", "builtins exec", "__builtin__ eval",
    "builtins getattr", "builtins __import__", "builtins open", "importlib import_module", "runpy run_path",
    "torch load", "torch.hub load", "torch._utils _rebuild_tensor_v9", "torch.storage _load_from_bytes",
    "code interact",
    "numpy.core.multiarray _reconstruct", "numpy load", "pickle loads", "functools partial", "operator attrgetter",
    "webbrowser open", "socket create_connection", "ctypes CDLL", "shutil rmtree", "collections OrderedDict.__init__",
    "turbojax.cli main", "convert.cli run", "a b c", "", "collections  OrderedDict", "types FunctionType",
    "torch.nn.modules.linear Linear", "argparse Namespace", "builtins object", "copyreg _reconstructor",
)  # fmt: skip
OPCODES = (b"(", b")", b"}", b"]", b"t", b"u", b"R", b"s", b"0", b"2", b"e", b"b", b"Q", b"h\0", b"q\0", b"K\1")
HUGE = (-1, -(2**31), 2**31, 2**32 - 1, 2**53, 2**60, 2**63 - 1, 2**63, 2**64, 10**30, 0, 1, 7)
DTYPES = {"F32": 4, "BF16": 2, "I8": 1, "F64": 8, "BOOL": 1, "F8_E4M3": 1, "I64": 8}


# Events of Python's audit hooks that reading a checkpoint has no part in.
FORBIDDEN = (
    "compile", "ctypes", "exec", "import", "marshal", "os.chmod", "os.exec", "os.fork", "os.posix_spawn", "os.remove",
    "os.spawn", "os.system", "pickle", "shutil", "socket", "subprocess",
)  # fmt: skip

# Torch's containers, written by hand so that every field can lie.


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(value: str) -> bytes:
    module, _, attribute = value.partition(" ")
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(items: list[bytes]) -> bytes:
    return b"(" + b"".join(items) + b"t"


def tensor(key="0", count=4, offset=0, shape=(2, 2), strides=(2, 1), kind="torch FloatStorage", rebuild=None) -> bytes:
    storage = tuple_of([text("storage"), name(kind), text(key), text("cpu"), number(count)]) + b"Q"
    numbers = [tuple_of([number(n) for n in values]) for values in (shape, strides)]
    fields = [storage, number(offset), *numbers, b"\x89", name("collections OrderedDict") + b")R"]
    return name(rebuild or "torch._utils _rebuild_tensor_v2") + tuple_of(fields) + b"R"


def table(entries: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def archive(pickle: bytes, records: dict[str, bytes] | None = None, **options) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + pickle + b".")
        for key, data in (records or {"archive/data/0": bytes(16), "archive/version": b"3\n"}).items():
            file.writestr(key, data)
    return out.getvalue()


def safetensors(header: object, data: bytes = bytes(64), length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length % 2**64) + encoded + data


# Families of hostile files: (suffix, bytes) from a source of chance.


def mutated(chance: random.Random, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """A good file with a few bytes changed, cut, doubled or moved; mostly where the structure is."""
    seed = chance.choice(sorted(seeds))
    data = bytearray(seeds[seed])
    for _ in range(chance.randint(1, 6)):
        size = len(data)
        if not size:
            break
        near = chance.choice(
            (chance.randrange(size), chance.randrange(min(size, 3000)), -chance.randrange(min(size, 3000)))
        )
        at, length = near % size, chance.choice((1, 1, 2, 4, 8, 100, 5000))
        action = chance.randrange(6)
        if action == 0:
            data[at : at + length] = chance.randbytes(len(data[at : at + length]))
        elif action == 1:
            del data[at : at + length]
        elif action == 2:
            data[at:at] = data[at : at + length]
        elif action == 3:
            del data[at:]
        elif action == 4:
            data[at : at + 4] = struct.pack("<I", chance.choice(HUGE) % 2**32)[: len(data[at : at + 4])]
        else:
            data[at] ^= 1 << chance.randrange(8)
    return Path(seed).suffix, bytes(data)


def lying_header(chance: random.Random, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """A safetensors header of which one or more fields lie."""
    odd = [None, True, "1", 1.5, [], {}, [1, 2, 3], *HUGE]
    names = [
        "a",
        "blocks.0.self_attn.q.bias",
        "../../evil",
        "/etc/passwd",
        "x" * 300,
        "\0",
        "\ud800",
        "",
        "__metadata__",
    ]
    header: dict = {}
    position = 0
    for _ in range(chance.randint(1, 4)):
        dtype = chance.choice(sorted(DTYPES))
        shape = [chance.randint(0, 3) for _ in range(chance.randint(0, 3))]
        size = DTYPES[dtype]
        for n in shape:
            size *= n
        entry: dict = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
        for _ in range(chance.randint(0, 2)):
            field = chance.choice(("dtype", "shape", "data_offsets", "more", "inner", "gone"))
            if field == "gone":
                entry.pop(chance.choice(sorted(entry)), None)
            elif field == "inner" and isinstance(entry.get("shape"), list):
                entry["shape"] = [*entry["shape"], chance.choice(odd)]
            elif field == "data_offsets":
                entry[field] = chance.choice(([chance.choice(HUGE), chance.choice(HUGE)], chance.choice(odd)))
            else:
                entry[field] = chance.choice(odd)
        header[chance.choice(names)] = entry if chance.random() < 0.95 else chance.choice(odd)
    if chance.random() < 0.2:
        header["__metadata__"] = chance.choice([*odd, {"turbojax.config": '{"kind": "dit"}'}, {"a": "b"}])
    length = chance.choice((None, None, None, *HUGE))
    encoded = json.dumps(header).encode()
    if chance.random() < 0.1:
        encoded = encoded.replace(b"1", b"1" * 5000) if chance.random() < 0.5 else b"[" * chance.randrange(90000)
    return ".safetensors", safetensors(encoded, bytes(chance.choice((0, position, position + 1, 64))), length)


def call(chance: random.Random, path: str) -> bytes:
    """A pickle that would run something, in one of the ways that pickles have."""
    argument = text(chance.choice((f"touch {path}", "__import__('os').abort()", path)))
    module, _, attribute = chance.choice(GLOBALS).partition(" ")
    classic, modern = name(f"{module} {attribute}"), text(module) + text(attribute) + b"\x93"
    return chance.choice(
        (
            classic + tuple_of([argument]) + b"R",
            modern + tuple_of([argument]) + b"R",
            b"(" + argument + f"i{module}\n{attribute}\n".encode(),
            b"(" + classic + argument + b"o",
            classic + tuple_of([argument]) + b"\x81",
            classic + tuple_of([argument]) + b"}\x92",
            classic + b")R" + argument + b"b",
            name("collections OrderedDict") + b")R" + table({"__class__": classic, "__setstate__": classic}) + b"b",
            name("collections defaultdict") + tuple_of([classic]) + b"R",
            name("torch._tensor _rebuild_from_type_v2")
            + tuple_of([classic, classic, tuple_of([argument]), b"}"])
            + b"R",
            name("torch._utils _rebuild_parameter") + tuple_of([classic + tuple_of([argument]) + b"R"]) + b"R",
            bytes([0x82, chance.randrange(256)]),
            argument + b"P0\n",
            tuple_of([classic, argument]) + b"Q",
            name("collections OrderedDict") + tuple_of([classic]) + b"R",
        )
    )


def hostile_pickle(chance: random.Random, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """Code to run, stacks and memos to blow, sizes that lie."""
    depth = chance.choice((50, 1000, 30000))
    bombs: list[Callable[[], bytes]] = [
        lambda: call(chance, "PWNED"),
        lambda: table({"state_dict": table({"a": tensor(), "b": call(chance, "PWNED")})}),
        lambda: b"}" + b"r" + struct.pack("<I", chance.choice(HUGE) % 2**32),  # a memo of four billion places
        lambda: b"B" + struct.pack("<I", 2**31) + b"x",
        lambda: b"\x8e" + struct.pack("<Q", chance.choice(HUGE) % 2**64) + b"x",
        lambda: b"\x8d" + struct.pack("<Q", 2**60) + b"x",
        lambda: b"\x8b" + struct.pack("<i", chance.choice((2**31 - 1, -1))) + b"x",
        lambda: b"L" + b"9" * chance.choice((100, 100000)) + b"L\n",
        lambda: b"I" + b"1" * 100000 + b"\n",
        lambda: b"(" * depth + b"t" * depth,
        lambda: b"]" * depth + b"a" * (depth - 1),
        # Each list holds the last one ten times over: 10^30 entries.
        lambda: b"]q\x00" + b"".join(b"](" + b"h\x00" * 10 + b"eq\x00" for _ in range(30)),
        lambda: (
            b"}q\x00"
            + b"".join(b"}(" + b"".join(text(str(k)) + b"h\x00" for k in range(9)) + b"uq\x00" for _ in range(30))
        ),
        # A key whose hash takes 2^60 steps.
        lambda: b")q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60)) + b"}h\x00K\x01s",
        lambda: b"}q\x00" + text("a") + b"h\x00s",  # a dict that holds itself
        lambda: b"]q\x00h\x00a",
        lambda: bytes(chance.randrange(256) for _ in range(chance.randrange(400))),
        lambda: b"".join(chance.choice(OPCODES) for _ in range(chance.randrange(200))),
        lambda: b"N" * 100000,
        lambda: text("\udcff" * 10),
        lambda: table({f"k{i}": tensor() for i in range(200)}) + b"0" * 3,
        lambda: b"\x95" + struct.pack("<Q", 2**60) + b"}",
    ]
    return chance.choice((".pth", ".pt", ".ckpt")), archive(chance.choice(bombs)())


def lying_tensor(chance: random.Random, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """A state dict of good pickles whose tensors lie about their place."""

    def numbers() -> tuple[int, ...]:
        return tuple(chance.choice((0, 1, 2, 2, *HUGE)) for _ in range(chance.choice((0, 1, 2, 2, 3, 20))))

    kinds = ("torch HalfStorage", "torch UntypedStorage", "torch QInt8Storage", "torch DoubleStorage", "os system",
             "torch.storage TypedStorage", "torch BoolStorage", "torch float32")  # fmt: skip
    rebuilds = ("_rebuild_tensor_v3", "_rebuild_tensor", "_rebuild_qtensor", "_rebuild_sparse_tensor")
    lies: dict[str, Callable[[], object]] = {
        "key": lambda: chance.choice(("0", "1", "../0", "../../../etc/passwd", "", "data.pkl", "x" * 300)),
        "count": lambda: chance.choice(HUGE),
        "offset": lambda: chance.choice(HUGE),
        "shape": numbers,
        "strides": numbers,
        "kind": lambda: chance.choice(kinds),
        "rebuild": lambda: f"torch._utils {chance.choice(rebuilds)}",
    }

    def lie() -> bytes:
        chosen = chance.sample(sorted(lies), chance.randint(0, 3))
        return tensor(**{field: lies[field]() for field in chosen})

    keys = [
        "blocks.0.self_attn.q.bias",
        "patch_embedding.weight",
        "a",
        "../x",
        "lora_A.weight",
        "m.lora_A.weight",
        "m.diff",
    ]
    return ".pth", archive(table({key: lie() for key in chance.sample(keys, chance.randint(1, 4))}))


def broken_zip(chance: random.Random, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """Directories that lie, bombs, overlapping and misnamed records."""
    good = table({"a": tensor(), "b": tensor("1")})
    records = {"archive/data/0": bytes(16), "archive/data/1": bytes(16)}
    kind = chance.randrange(9)
    if kind == 0:  # 100 MB of zeros in 100 kB
        return ".pth", archive(good, {"archive/data/0": bytes(10_000_000)}, compression=zipfile.ZIP_DEFLATED)
    if kind == 1:
        odd = chance.choice(
            ("../evil", "/etc/evil", "archive/../../evil", "archive/data/0/", "a" * 60000, "\u202e", "other/data.pkl")
        )
        return ".pth", archive(good, records | {odd: b"x"})
    if kind == 2:
        return ".pth", archive(good, {f"archive/data/{i}": b"" for i in range(chance.choice((2000, 66000)))})
    if kind == 3:  # no pickle, or bytes before or behind
        data = archive(good, records)
        return ".pth", chance.choice(
            (data.replace(b"data.pkl", b"data.plk"), b"PK" + data, data + b"x" * 70000, data[30:])
        )
    data = bytearray(archive(good, records))
    entries = [m.start() for m in re.finditer(b"PK\x01\x02", data)]
    end = data.rindex(b"PK\x05\x06")
    at = chance.choice(entries)
    if kind == 4:  # sizes, offsets, lengths of an entry
        field, form = chance.choice(
            ((20, "<I"), (24, "<I"), (42, "<I"), (28, "<H"), (30, "<H"), (32, "<H"), (8, "<H"), (10, "<H"))
        )
        data[at + field : at + field + struct.calcsize(form)] = struct.pack(
            form, chance.choice(HUGE) % 2 ** (8 * struct.calcsize(form))
        )
    elif kind == 5:  # two entries for one record
        data[at + 42 : at + 46] = data[entries[0] + 42 : entries[0] + 46]
    elif kind == 6:  # the end record
        field, form = chance.choice(((8, "<H"), (10, "<H"), (12, "<I"), (16, "<I"), (20, "<H")))
        data[end + field : end + field + struct.calcsize(form)] = struct.pack(
            form, chance.choice(HUGE) % 2 ** (8 * struct.calcsize(form))
        )
    elif kind == 7:  # a zip64 end record with numbers of its own
        numbers = [chance.choice(HUGE) % 2**64 for _ in range(3)]
        end64 = struct.pack(
            "<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, numbers[0], numbers[0], numbers[1], numbers[2]
        )
        where = chance.choice((end, chance.choice(HUGE) % 2**64))
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, where, 1)
        tail = data[end:]
        tail[10:20] = b"\xff" * 10
        data[end:] = end64 + locator + tail
    else:  # a local header that says something else
        local = struct.unpack("<I", data[at + 42 : at + 46])[0]
        field = chance.choice((0, 26, 28, 30))
        data[local + field : local + field + 2] = chance.randbytes(2)
    return ".pth", bytes(data)


def other(chance: random.Random, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """No checkpoint at all."""
    junk = [
        b"", b"\x80", b"\x80\x02.", b"PK", b"PK\x05\x06" + bytes(18), b"GGUF" + bytes(99), b"\x7fELF" + bytes(99),
        b"{}", bytes(1 << 16), chance.randbytes(chance.randrange(3000)), b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
    ]  # fmt: skip
    return chance.choice((".pth", ".safetensors", ".ckpt", ".bin", "", ".index.json")), chance.choice(junk)


FAMILIES = (
    mutated,
    mutated,
    mutated,
    lying_header,
    lying_header,
    hostile_pickle,
    hostile_pickle,
    lying_tensor,
    broken_zip,
    other,
)


def hostile_file(index: int, seeds: dict[str, bytes]) -> tuple[str, bytes]:
    """The file of that number: (suffix, bytes)."""
    chance = random.Random(index)
    return FAMILIES[index % len(FAMILIES)](chance, seeds)


# The child.


class Hang(BaseException):
    pass


def main(first: int, last: int, scratch: Path) -> dict:
    from convert import CheckpointError, convert_checkpoint, inspect_checkpoint

    seeds = {p.name: p.read_bytes() for p in sorted((scratch / "seeds").iterdir())}
    place, out = scratch / "files", scratch / "out"
    place.mkdir()
    out.mkdir()
    (place / "config.json").write_text('{"dim": 16, "num_heads": 2}')
    for seed, data in seeds.items():  # imports and caches first: what follows is watched
        (place / seed).write_bytes(data)
        inspect_checkpoint(place / seed)
        if "lora" not in seed:
            convert_checkpoint(place / seed, out / seed, format="safetensors")
    seen: list[str] = []
    watching = False

    def audit(event: str, args: tuple) -> None:
        if not watching:
            return
        inside = bool(args) and str(args[0]).startswith(str(out))
        if event == "open":
            forbidden = isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR)) and not inside
        else:
            forbidden = event.startswith(FORBIDDEN) and not inside
        if forbidden:
            seen.append(f"{event} {args!r:.80}")

    sys.addaudithook(audit)

    def hang(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGVTALRM, hang)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (512 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.chdir(scratch)
    counts, failures = {"refused": 0, "read": 0}, []
    for index in range(first, last):
        suffix, data = hostile_file(index, seeds)
        path = place / f"hostile{suffix}"
        path.write_bytes(data)
        target = out / "component"
        trouble = None
        signal.setitimer(signal.ITIMER_VIRTUAL, 5)
        watching = True
        try:
            description = inspect_checkpoint(path)
            if "LoRA" not in description:
                convert_checkpoint(path, target, format="safetensors")
            counts["read"] += 1
        except CheckpointError as error:
            counts["refused"] += 1
            message = str(error)
            if "hostile" not in message or "\n" in message or len(message) > 1500 + len(str(path)):
                trouble = f"an unclear message: {message[:300]}"
            elif target.exists():
                trouble = "an output in spite of an error"
        except BaseException as error:
            trouble = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            watching = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if seen:
            trouble = f"did {seen}"
            seen.clear()
        if target.exists():
            for file in target.iterdir():
                file.unlink()
            target.rmdir()
        left = sorted({p.name for p in out.iterdir()} - set(seeds))
        if left:
            trouble = f"left {left}"
        if Path("PWNED").exists():
            trouble = "ran code"
        if trouble is not None:
            failures.append(f"file {index} ({FAMILIES[index % len(FAMILIES)].__name__}): {trouble}")
        path.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**counts, "failures": failures[:20], "failed": len(failures), "peak_megabytes": peak // 1024}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
