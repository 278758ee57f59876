"""Reads the tensors of a file that torch.save wrote, without PyTorch.

Such a file is a zip archive: a pickle that says what there is, and one entry
of raw bytes for each storage. The pickle is not loaded: its opcodes are read
one by one here, and the few that build dictionaries and tensors are followed.
Any other function or class it names is refused, so nothing in it is executed.

The bytes are mapped into memory, and only what is indexed is read.
"""

import math
import pathlib
import pickletools
import struct
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from audiomosaic_jax import torch_files

STORAGES = {
  "torch DoubleStorage": np.float64,
  "torch FloatStorage": np.float32,
  "torch HalfStorage": np.float16,
  "torch BFloat16Storage": ml_dtypes.bfloat16,
  "torch LongStorage": np.int64,
  "torch IntStorage": np.int32,
  "torch ShortStorage": np.int16,
  "torch CharStorage": np.int8,
  "torch ByteStorage": np.uint8,
  "torch BoolStorage": np.bool_,
}
DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
KNOWN = (*STORAGES, DICT, TENSOR, PARAMETER)
# Of a local header: its size, and where the lengths of name and extra are.
HEADER_BYTES, LENGTHS_AT = 30, 26


class Symbol(NamedTuple):
  """A function or class that the pickle names."""

  name: str


class Storage(NamedTuple):
  """Raw bytes of the archive."""

  dtype: Any
  entry: str


class View(NamedTuple):
  """A tensor: elements of a storage, steps counted in elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def read_views(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Maps the tensors of a state dict.

  Args:
    path: file that torch.save wrote, of PyTorch 1.6 or later.

  Returns:
    Stored names to read-only arrays, whose bytes are read when used.

  Raises:
    ValueError: it is damaged, of an older form, or holds more than tensors.
  """
  if not zipfile.is_zipfile(path):
    raise ValueError(
      f"{path} is not a zip archive, as torch.save writes since PyTorch 1.6; "
      "save it again, or download it again"
    )
  with zipfile.ZipFile(path) as archive:
    entries = {entry.filename: entry for entry in archive.infolist()}
    found = [n for n in entries if n.rpartition("/")[2] == "data.pkl"]
    if len(found) != 1:
      raise ValueError(
        f"{path} holds {len(found)} data.pkl, not one; is it of torch.save?"
      )
    root = found[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    if order in entries and archive.read(order) != b"little":
      raise ValueError(f"{path} is big-endian; save it on another machine")
    content = archive.read(found[0])
  state = torch_files.unwrapped(_follow(content, path), path)
  data = np.memmap(path, np.uint8, mode="r")
  return {
    name: _map(view, name, data, entries, root, path)
    for name, view in state.items()
  }


def _map(view, name, data, entries, root, path) -> np.ndarray:
  """Returns the array of a tensor, after checking that it is inside."""
  if not isinstance(view, View):
    raise ValueError(
      f"{path}: {name} is a {type(view).__name__} and no tensor; save "
      "model.state_dict() alone"
    )
  entry = entries.get(f"{root}data/{view.storage.entry}")
  if entry is None or entry.compress_type != zipfile.ZIP_STORED:
    raise ValueError(f"{path}: the bytes of {name} are missing or compressed")
  at = entry.header_offset + LENGTHS_AT
  start = entry.header_offset + HEADER_BYTES
  start += sum(struct.unpack("<HH", data[at : at + 4].tobytes()))
  stored = data[start : start + entry.file_size]
  itemsize = np.dtype(view.storage.dtype).itemsize
  last = view.offset + sum(
    (size - 1) * stride
    for size, stride in zip(view.shape, view.strides, strict=True)
  )
  numbers = (view.offset, *view.shape, *view.strides)
  inside = (last + 1) * itemsize <= len(stored) == entry.file_size
  if min(numbers) < 0 or (math.prod(view.shape) and not inside):
    raise ValueError(f"{path}: {name} reaches beyond its bytes; it is damaged")
  size = len(stored) // itemsize * itemsize
  return np.lib.stride_tricks.as_strided(
    stored[:size].view(view.storage.dtype)[view.offset :],
    view.shape,
    [stride * itemsize for stride in view.strides],
    writeable=False,
  )


def _follow(content: bytes, path: pathlib.Path) -> Any:
  """Returns what a pickle describes, made of dictionaries and Views."""
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}
  try:
    for opcode, argument, _ in pickletools.genops(content):
      if opcode.name == "PROTO":
        continue
      if opcode.name in ("BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
      elif opcode.name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
      elif opcode.name == "MARK":
        marks.append(len(stack))
      elif opcode.name == "STOP":
        return stack.pop()
      elif opcode.name == "GLOBAL":
        stack.append(_symbol(argument))
      elif opcode.name in LITERALS:
        stack.append(LITERALS[opcode.name](argument))
      else:
        _build(opcode.name, stack, marks)
  except (IndexError, KeyError, TypeError, AttributeError, ValueError) as error:
    raise ValueError(
      f"cannot read {path}: {error}; it is damaged, or holds more than "
      "tensors: save model.state_dict() alone"
    ) from error
  raise ValueError(f"cannot read {path}: it has no end")


def _build(name: str, stack: list[Any], marks: list[int]) -> None:
  """Follows an opcode that takes from the stack."""
  if name in ("TUPLE", "SETITEMS", "APPENDS"):
    start = marks.pop()
    items = stack[start:]
    del stack[start:]
    if name == "TUPLE":
      stack.append(tuple(items))
    elif name == "APPENDS":
      stack[-1].extend(items)
    else:
      stack[-1].update(zip(items[::2], items[1::2], strict=True))
  elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
    size = int(name[-1])
    items = tuple(stack[-size:])
    del stack[-size:]
    stack.append(items)
  elif name == "SETITEM":
    value, key = stack.pop(), stack.pop()
    stack[-1][key] = value
  elif name == "APPEND":
    value = stack.pop()
    stack[-1].append(value)
  elif name == "BINPERSID":
    kind, dtype, entry, _, _ = stack.pop()
    if kind != "storage":
      raise ValueError(f"it refers to a {kind!r}")
    stack.append(Storage(STORAGES[dtype.name], entry))
  elif name == "REDUCE":
    arguments, function = stack.pop(), stack.pop()
    stack.append(_call(function, arguments))
  elif name == "BUILD":
    # Versions of modules, of which a state dict keeps a note.
    stack.pop()
  else:
    raise ValueError(f"it uses {name}")


def _symbol(name: str) -> Symbol:
  if name not in KNOWN:
    raise ValueError(f"it names {name.replace(' ', '.')}, which is not run")
  return Symbol(name)


def _call(function: Symbol, arguments: tuple[Any, ...]) -> Any:
  """Returns what one of the known functions would make."""
  if function.name == DICT:
    return dict(*arguments)
  if function.name == PARAMETER:
    return arguments[0]
  if function.name == TENSOR:
    storage, offset, shape, strides, *_ = arguments
    numbers = (offset, *shape, *strides)
    whole = all(isinstance(number, int) for number in numbers)
    fits = isinstance(storage, Storage) and len(shape) == len(strides)
    if not (whole and fits):
      raise ValueError("it holds a tensor that is none")
    return View(storage, offset, shape, strides)
  raise ValueError(f"it calls {function.name}")


LITERALS = {
  "EMPTY_DICT": lambda _: {},
  "EMPTY_LIST": lambda _: [],
  "EMPTY_TUPLE": lambda _: (),
  "NONE": lambda _: None,
  "NEWTRUE": lambda _: True,
  "NEWFALSE": lambda _: False,
  **dict.fromkeys(
    (
      "BINUNICODE",
      "SHORT_BINUNICODE",
      "BININT",
      "BININT1",
      "BININT2",
      "LONG1",
      "BINFLOAT",
    ),
    lambda value: value,
  ),
}
