"""Small changes of Python source, each identified by its text, for ``mutants.py``."""

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONTRARY: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip
SWAPPED = {"min": "max", "max": "min", "ceil": "floor", "floor": "ceil", "any": "all", "all": "any"}
TO_OPERAND = set(
    "abs clamp clamp_min detach clone double exp flip float round sort sorted sqrt square".split()
)
"""Functions and methods that return the type of their operand, which can replace the call."""
OPTIONAL = set("sum mean std flatten softmax cat stack cumsum get".split())
"""Functions and methods whose last argument can be omitted."""
UNSEEN = {"strict", "device", "indent", "encoding"}
"""Arguments with no testable effect: impossible cases, CPU or UTF-8 defaults, formatting for readers."""
SKIPPED = {"annotation", "returns", "decorator_list"}
SHOWN = (ast.expr, ast.keyword, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return)
"""Parents shown as context of a number or slice in a mutant's text."""
STATEMENTS = (ast.AugAssign, ast.Raise, ast.Continue, ast.Break, ast.Delete)

IMPORT = range(1)
"""Stands for the lines of a file that run when it is imported."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    function: str
    operator: str
    change: str
    """Source before and after the change."""
    lines: range
    scope: range
    """Lines of the enclosing function; ``IMPORT`` outside functions."""
    text: str
    """The whole mutated file."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Identifies the mutant even if its lines move."""
        return self.path, self.function, self.change

    def rank(self, key: str) -> str:
        """Sort key for sampling; it does not change if the function moves to another file."""
        return hashlib.sha256(f"{key}{self.function}: {self.change}".encode()).hexdigest()


@dataclass(frozen=True)
class Signatures:
    """Signatures of functions in the sources: dropping a required argument would only be a TypeError."""

    required: Mapping[str, set[str]]
    """Required parameters of every function and dataclass."""
    variadic: set[str]
    """Functions that take any number of arguments."""

    @classmethod
    def of(cls, sources: Sequence[str]) -> "Signatures":
        """Read the definitions in some files."""
        required: dict[str, set[str]] = {}
        variadic = set()
        for node in (node for source in sources for node in ast.walk(ast.parse(source))):
            if isinstance(node, ast.FunctionDef):
                own = node.args
                plain = own.args[: len(own.args) - len(own.defaults)]
                named = [one for one, given in zip(own.kwonlyargs, own.kw_defaults, strict=True) if not given]
                required.setdefault(node.name, set()).update(one.arg for one in [*plain, *named])
                variadic |= {node.name} if own.vararg else set()
            elif isinstance(node, ast.ClassDef):
                fields = (one for one in node.body if isinstance(one, ast.AnnAssign) and not one.value)
                required.setdefault(node.name, set()).update(ast.unparse(one.target) for one in fields)
        return cls(required, variadic)


def mutants_of(path: str, source: str, signatures: Signatures) -> list[Mutant]:
    """Every mutant of one file that compiles, in the order of the source."""
    maker = _Maker(path, source, signatures)
    maker.visit(ast.parse(source), ast.Module([], []), "", (), IMPORT)
    return maker.found


class _Maker:
    def __init__(self, path: str, source: str, signatures: Signatures) -> None:
        self.path, self.signatures = path, signatures
        self.raw = source.encode()
        lengths = [len(line) for line in self.raw.splitlines(keepends=True)]
        self.starts = [sum(lengths[:n]) for n in range(len(lengths))]
        self.found: list[Mutant] = []
        self.seen: Counter[tuple[str, str]] = Counter()

    def visit(self, node: Any, parent: ast.AST, place: str, names: tuple[str, ...], scope: range) -> None:
        """Make the mutants of a node and its children."""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = (*names, node.name)
        if isinstance(node, ast.FunctionDef):
            scope = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        if hasattr(node, "lineno"):
            for operator, other in self.alternatives(node, place):
                self.add(node, other, parent, place, operator, ".".join(names) or "module", scope)
        # Skip messages and impossible cases; f-strings have no positions before Python 3.12.
        unseen = isinstance(node, ast.keyword) and node.arg in UNSEEN
        silent = unseen or isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert)
        if silent or (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger.")):
            return
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in SKIPPED:
                    self.visit(child, node, name, names, scope)

    def add(
        self,
        node: Any,
        other: Any,
        parent: ast.AST,
        place: str,
        operator: str,
        function: str,
        scope: range,
    ) -> None:
        """Keep a change if it compiles."""
        begin = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        bracketed = isinstance(other, ast.expr) and not isinstance(other, ast.Slice | ast.Constant)
        new = f"({ast.unparse(other)})" if bracketed else ast.unparse(other)
        text = (self.raw[:begin] + new.encode() + self.raw[end:]).decode()
        before, after = node, other
        if isinstance(parent, ast.arguments):
            before, after = (ast.keyword(_parameter(parent, node), value) for value in (node, other))
        elif isinstance(node, ast.Constant | ast.Slice) and isinstance(parent, SHOWN):
            value = getattr(parent, place)  # a number alone says little: show its context
            swapped = [other if one is node else one for one in value] if isinstance(value, list) else other
            before, after = parent, _with(parent, **{place: swapped})
        change = f"{ast.unparse(before)}  ->  {ast.unparse(after)}"
        self.seen[function, change] += 1
        if self.seen[function, change] > 1:
            change += f"  ({self.seen[function, change]})"
        try:
            compile(text, self.path, "exec")
        except SyntaxError:
            return
        lines = range(node.lineno, node.end_lineno + 1)
        self.found.append(Mutant(self.path, function, operator, change, lines, scope, text))

    def alternatives(self, node: Any, place: str) -> Iterator[tuple[str, ast.AST]]:
        """Yield every change of one node: the operator's name and the replacement."""
        if isinstance(node, ast.Call):
            yield from self.of_call(node)
        elif isinstance(node, ast.Constant):
            yield from _of_constant(node)
        elif isinstance(node, ast.Slice):
            yield from (
                ("slice", _with(node, **{end: None})) for end in ("lower", "upper") if getattr(node, end)
            )
        elif isinstance(node, ast.stmt):
            yield from _of_statement(node)
        else:
            yield from _of_expression(node)
        if place == "test" and isinstance(node, ast.Name | ast.Attribute | ast.Call | ast.NamedExpr):
            yield "logic", ast.UnaryOp(ast.Not(), node)

    def of_call(self, call: ast.Call) -> Iterator[tuple[str, ast.AST]]:
        """Drop an argument or the call, or call the opposite function."""
        attribute = isinstance(call.func, ast.Attribute)
        place = "attr" if attribute else "id"
        name = getattr(call.func, place, "")
        for at, keyword in enumerate(call.keywords):
            if keyword.arg and keyword.arg not in self.signatures.required.get(name, set()) | UNSEEN:
                yield "argument", _with(call, keywords=call.keywords[:at] + call.keywords[at + 1 :])
        if len(call.args) > 1 - attribute and name in self.signatures.variadic | OPTIONAL:
            yield "argument", _with(call, args=call.args[:-1])
        if name in SWAPPED:
            yield "function", _with(call, func=_with(call.func, **{place: SWAPPED[name]}))
        if name in TO_OPERAND and isinstance(call.func, ast.Attribute) and not call.args[1:]:
            yield "function", call.func.value
        elif name in {"abs", "clamp", "sorted"} and call.args:
            yield "function", call.args[0]


def _of_constant(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.value, bool):
        yield "constant", _with(node, value=not node.value)
    elif isinstance(node.value, int | float):
        yield "constant", _with(node, value=node.value + 1)


def _of_statement(node: Any) -> Iterator[tuple[str, ast.AST]]:
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    state = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    if call or state or isinstance(node, STATEMENTS):
        yield "statement", ast.Pass()
    if isinstance(node, ast.AugAssign) and type(node.op) in CONTRARY:
        yield "arithmetic", _with(node, op=CONTRARY[type(node.op)]())


def _of_expression(node: Any) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in CONTRARY:
        yield "comparison", _with(node, ops=[CONTRARY[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in CONTRARY:
        yield (
            "logic" if isinstance(node, ast.BoolOp) else "arithmetic",
            _with(node, op=CONTRARY[type(node.op)]()),
        )
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "logic" if isinstance(node.op, ast.Not) else "arithmetic", node.operand
    elif isinstance(node, ast.IfExp):
        yield from (("choice", node.body), ("choice", node.orelse))


def _parameter(arguments: ast.arguments, default: ast.AST) -> str:
    """Name of the parameter that has this default."""
    plain = arguments.args[len(arguments.args) - len(arguments.defaults) :]
    pairs: list[tuple[ast.arg, ast.expr | None]] = [*zip(plain, arguments.defaults, strict=True)]
    pairs += [*zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return next(parameter.arg for parameter, value in pairs if value is default)


def _with(node: Any, **changes: Any) -> Any:
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
