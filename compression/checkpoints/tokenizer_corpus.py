"""Texts on which tokenizers disagree when they disagree at all."""

TEXTS = (
    "", "a", " ", "Hello, world!", " leading", "trailing ", "  two   three    four", "\n", "\n\n\n", " \n", "\n ",
    "\t\ttabs\t\n\r\n mixed \r line ends",
    "a\n\n  b \t c   \n", "a\u00a0b\u2003c\u3000d",
    "x    1", "a  12\n\n  3", "1   \n 22\t 333 \n\n4", "7\r\n  8 ,9  .0", "no1 2nd   3rd-4th", "if  x==  10:\n    return   -1\n\n\n  0",
    "0 1 12 123 1234 12345 1234567890", "3.14159, 1,000,000.00; 1e-9 0x1F 2²³ ½ ٣٤٥ Ⅷ",
    "I'm, you're, he'll, we've, they'd, it's, don't; I'M YOU'RE HE'LL 'Tis 'sx '' '",
    "def f(x: int) -> str:\n    return f\"{x!r}\" if x >= 0 else '-'  # comment\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; }  // => != == && ||\n<html lang=\"en\">&amp;</html>",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case x1y2z3 __init__",
    "!!! ??? ... ,,, ;;; --- === *** ### $$$ %%% @@@ ~~~ ``` ((( ))) [[[ ]]] {{{ }}} \\\\ ||| ///",
    "Ünïcödé naïve façade Straße Ελληνικά Русский язык Việt Nam Kłobuck ĲǅŁ",
    "日本語のテキスト、中文字符。한국어 문장 ไทย हिन्दी বাংলা العربية עברית فارسی",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 ✅ 🦙🦙 ☕️ ∑∫√ ≤≥≠ → ← “quotes” ‘single’ — – … •",
    "e\u0301 \u1e9b\u0323 \ufb01 \u200b zero\u200dwidth \ufeffbom \u202eleft",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b\x7f\x80\x9f", "\U00010348 \U0001f600 \U0002a6a5 \U000e0041 \U0010ffff \ue000 \ufffd",
    "At noon Pemir went to the tower.\nQuestion: Where is the kettle?\nAnswer: in the barn",
    "antidisestablishmentarianism " * 3, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "<s", "</s", "<|", "<0x41>", "[PAD", "▁ ▁▁x",
)  # fmt: skip


def every_two_byte_character() -> list[str]:
    """All characters of one or two bytes in UTF-8 but NUL, 64 a text."""
    every = "".join(chr(i) for i in range(1, 0x800))
    return [every[i : i + 64] for i in range(0, len(every), 64)]
