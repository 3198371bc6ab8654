"""Runs PTX as one warp would: for programs that no interpreter of Pallas can take.

Knows the instructions that the kernels use and refuses any other. Lanes go in step, and a branch that they do not all
take is an error: the programs have none.
"""

import re
from collections.abc import Sequence

import numpy as np

LANES = 32
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "ge": np.greater_equal, "gt": np.greater}
JOIN = {"and": np.logical_and, "or": np.logical_or}
SIGNED = {"u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32}
ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
}


class Warp:
    """One of `warps` of the block `block` of `blocks`, over arrays in global memory: $0, $1, ... of the program."""

    def __init__(self, arrays: Sequence[np.ndarray], *, block=0, blocks=1, warp=0):
        self.arrays = list(arrays)
        lane = np.arange(LANES, dtype=np.uint32)
        above = np.array([(2**LANES - 1) ^ (2 ** (i + 1) - 1) for i in range(LANES)], np.uint32)
        special = {
            "laneid": lane,
            "lanemask_gt": above,
            "tid.x": lane + LANES * warp,
            "ctaid.x": block,
            "nctaid.x": blocks,
        }
        self.values: dict[str, np.ndarray] = {f"%{k}": np.broadcast_to(np.uint32(v), LANES) for k, v in special.items()}
        # Addresses: the number of the array, then bytes into it.
        self.values |= {f"${i}": np.full(LANES, i << 40, np.int64) for i in range(len(arrays))}

    def run(self, program: str) -> None:
        code = program.strip().removeprefix("{").removesuffix("}").strip().splitlines()
        labels = {line[:-1]: i for i, line in enumerate(code) if line.endswith(":")}
        at = 0
        while at < len(code):
            line = code[at].removesuffix(";")
            at += 1
            if line.endswith(":") or line.startswith(".reg"):
                continue
            active = np.ones(LANES, bool)
            if line.startswith("@"):
                guard, line = line.split(None, 1)
                active = self.values[guard.lstrip("@!")]
                active = ~active if guard.startswith("@!") else active
            operation, _, rest = line.partition(" ")
            operands = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", rest) if part.strip()]
            if operation == "bra":
                assert active.all() or not active.any(), f"lanes part at {line}"
                at = labels[operands[0]] if active.all() else at
            else:
                self.execute(operation.split("."), operands, active)

    def execute(self, name: list[str], operands: list[str], active: np.ndarray) -> None:
        kind = name[-1]
        match name:
            case ["fence", *_] | ["bar", "warp", "sync"]:
                return
            case ["ld", *_]:
                names, place = self._vector(operands[0]), self._address(operands[1])
                for i, register in enumerate(names):
                    self._set(register, self._read(place + 4 * i, active), active)
                return
            case ["st", *_]:
                for i, register in enumerate(self._vector(operands[1])):
                    self._write(self._address(operands[0]) + 4 * i, self.values[register].view(np.uint32), active)
                return
            case ["red", *_, "add", "u32"]:
                place, term = self._address(operands[0]), self._get(operands[1], np.uint32)
                for lane in np.flatnonzero(active):
                    one = np.arange(LANES) == lane
                    self._write(place, self._read(place, one) + term, one)
                return
            case ["mov", _]:
                result = self._get(operands[1], np.uint32)
            case ["setp", compare, *join, _]:
                a, b = (self._get(x, SIGNED[kind]) for x in operands[1:3])
                result = COMPARE[compare](a, b)
                if join:
                    result = JOIN[join[0]](result, self.values[operands[3]])
            case ["vote", "sync", "ballot", "b32"]:
                mask = np.sum(self.values[operands[1]].astype(np.uint64) << np.arange(LANES, dtype=np.uint64))
                result = np.full(LANES, mask, np.uint32)
            case ["redux", "sync", "add", "u32"]:
                result = np.full(LANES, np.sum(self._get(operands[1], np.uint32), dtype=np.uint32))
            case ["popc", "b32"]:
                result = np.bitwise_count(self._get(operands[1], np.uint32)).astype(np.uint32)
            case ["prmt", "b32"]:
                result = self._permuted(*operands[1:])
            case ["mul", "wide", "u32"]:
                a, b = (self._get(x, np.uint32).astype(np.int64) for x in operands[1:])
                result = a * b
            case ["mad", "lo", "u32"]:
                a, b, c = (self._get(x, np.uint32) for x in operands[1:])
                result = a * b + c
            case ["add", "s64"]:
                result = self.values[operands[1]] + (
                    self.values[operands[2]] if operands[2] in self.values else int(operands[2])
                )
            case ["shfl", "sync", "idx", "b32"]:
                assert operands[3:] == ["31", "0xffffffff"]
                result = self._get(operands[1], np.uint32)[self._get(operands[2], np.uint32)]
            case ["div", *_]:
                a, b = (self._get(x, SIGNED[kind]) for x in operands[1:])
                result = (a / b if kind == "f32" else a // b).view(np.uint32)
            case [operation, *_] if operation in ARITHMETIC and kind in SIGNED:
                a, b = (self._get(x, SIGNED[kind]) for x in operands[1:])
                result = ARITHMETIC[operation](a, b).view(np.uint32)
            case _:
                raise NotImplementedError(".".join(name))
        self._set(operands[0], result, active)

    def _set(self, register: str, result: np.ndarray, active: np.ndarray) -> None:
        old = self.values.get(register, np.zeros(LANES, result.dtype))
        self.values[register] = np.where(active, result, old)

    def _get(self, operand: str, dtype: type) -> np.ndarray:
        if operand in self.values:
            return self.values[operand].view(dtype)
        hexadecimal = operand.removeprefix("0f") if operand.startswith("0f") else None
        bits = int(hexadecimal, 16) if hexadecimal else int(operand, 0)
        return np.full(LANES, bits % 2**32, np.uint32).view(dtype)

    def _vector(self, operand: str) -> list[str]:
        return [part.strip() for part in operand.strip("{}").split(",")]

    def _address(self, operand: str) -> np.ndarray:
        register, _, offset = operand.strip("[]").partition("+")
        return self.values[register.strip()] + int(offset or 0)

    def _place(self, address: int) -> tuple[np.ndarray, int]:
        words = self.arrays[address >> 40].reshape(-1).view(np.uint32)
        index, misplaced = divmod(address & (2**40 - 1), 4)
        assert not misplaced, "not at a word"
        assert index < len(words), "past the end of an array"
        return words, index

    def _read(self, place: np.ndarray, active: np.ndarray) -> np.ndarray:
        found = np.zeros(LANES, np.uint32)
        for lane in np.flatnonzero(active):
            words, index = self._place(int(place[lane]))
            found[lane] = words[index]
        return found

    def _write(self, place: np.ndarray, value: np.ndarray, active: np.ndarray) -> None:
        for lane in np.flatnonzero(active):
            words, index = self._place(int(place[lane]))
            words[index] = value[lane]

    def _permuted(self, a: str, b: str, selector: str) -> np.ndarray:
        pool = np.stack([self._get(x, np.uint32) for x in (a, b)], axis=1).view(np.uint8)
        picks = [int(selector, 0) >> 4 * i & 7 for i in range(4)]
        return np.ascontiguousarray(pool[:, picks]).view(np.uint32)[:, 0]
