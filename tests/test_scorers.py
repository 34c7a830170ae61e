"""The scorers of evaluation: cases worked out by hand, equality with libraries that do the same, use in a Trainer."""

import math

import evaluate
import jiwer
import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from training_examples.evaluation.intervals import bootstrap_interval, difference_interval
from training_examples.evaluation.scoring import (
    RowScorer,
    answer_hits,
    cider_d,
    edit_counts,
    exact_hits,
    load_scorer,
    repeat_counts,
    rouge_l,
)
from training_examples.evaluation.text_forms import (
    answer_text,
    chinese_text,
    count_errors,
    english_text,
    error_rate_options,
    normalize_pair,
    plain_text,
    spell_han_number,
    spoken_form,
    units_of,
)

# ------------------------------------------------------------------------------------------------ forms of texts


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "零"), (7, "七"), (10, "十"), (12, "十二"), (20, "二十"), (105, "一百零五"), (110, "一百一十"),
        (1000, "一千"), (1001, "一千零一"), (1010, "一千零一十"), (10000, "一万"), (10001, "一万零一"),
        (20500, "二万零五百"), (120000, "十二万"), (100200, "十万零二百"), (12345678, "一千二百三十四万五千六百七十八"),
        (100000000, "一亿"), (100000001, "一亿零一"), (1000050000, "十亿零五万"),
    ],
)  # fmt: skip
def test_a_chinese_number_in_words(number, words):
    assert spell_han_number(number) == words


@pytest.mark.parametrize("number", [-1, 10**16])
def test_a_chinese_number_out_of_range_is_refused(number):
    with pytest.raises(ValueError, match="10\\*\\*16"):
        spell_han_number(number)


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("你好，世界！", "你 好 世 界"),
        ("ＡＢＣ１２", "abc12"),  # full-width forms are ordinary ones; a name with digits stays whole
        ("我有１２个", "我 有 十 二 个"),
        ("2008年8月8日", "二 零 零 八 年 八 月 八 日"),
        ("3.14", "三 点 一 四"),
        ("50%的人", "百 分 之 五 十 的 人"),
        ("-5度", "负 五 度"),
        ("12,000元", "一 万 二 千 元"),
        ("13800138000", "一 三 八 零 零 一 三 八 零 零 零"),
        ("007", "零 零 七"),
        ("打开WiFi吧", "打 开 wifi 吧"),  # code-switching: the English word is one unit
        ("it's 好的", "it's 好 的"),
        ("<NOISE>是的[UNK]", "是 的"),
        ("<|zh|>是", "是"),
        ("", ""),
        ("。！？", ""),
        ("𠮷野", "𠮷 野"),  # an ideograph beyond the first plane
    ],
)
def test_chinese_text_as_it_is_counted(text, counted):
    assert chinese_text(text) == counted


def test_plain_text_drops_signs_and_keeps_apostrophes_inside_words():
    assert plain_text("Well-known: the dog’s 'bone'… ＯＫ?") == "well known the dog's bone ok"


def test_answers_are_compared_without_articles_and_accents():
    assert answer_text("The  Café, in São Paulo!") == "cafe in sao paulo"


def test_english_is_normalised_as_whisper_does():
    from whisper_normalizer.english import EnglishTextNormalizer

    normalizer = EnglishTextNormalizer()
    for text in ("Mr. O'Neill isn't twenty-one, he's 1,200!", "Colour [noise] (laughs) um, okay", "$5.30 and 3rd", ""):
        assert english_text(text) == " ".join(normalizer(text).split())


def test_an_unknown_form_or_unit_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="'klingon'.*chinese.*spoken"):
        normalize_pair("a", "b", "klingon")
    with pytest.raises(ValueError, match="'phoneme'.*word, character"):
        units_of("a", "phoneme")


# ------------------------------------------------------------------------------------------------ error rates


def test_an_error_rate_is_the_edits_of_all_rows_by_the_words_of_all_rows():
    # one substitution of 4 words; two insertions to none; one deletion of 1
    counts = edit_counts(["a b x d", "e f", ""], ["a b c d", "", "g"], "none")
    assert counts.tolist() == [[1, 0, 0, 4], [0, 0, 2, 0], [0, 1, 0, 1]]
    result = load_scorer("error_rate").compute(
        predictions=["a b x d", "e f", ""], references=["a b c d", "", "g"], normalizer="none", interval=False
    )
    assert result == {
        "error_rate": 4 / 5, "rows": 3, "substitutions": 1, "deletions": 1, "insertions": 2, "units": 5
    }  # fmt: skip


def test_error_rates_are_those_of_jiwer():
    rng = np.random.default_rng(0)
    words = "one two three four five".split()
    references = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(60)]
    hypotheses = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(60)]
    ours = edit_counts(hypotheses, references, "none").sum(0)
    theirs = jiwer.process_words(references, hypotheses)
    assert ours.tolist() == [
        theirs.substitutions, theirs.deletions, theirs.insertions, sum(len(r.split()) for r in references)
    ]  # fmt: skip
    references, hypotheses = ([text.replace(" ", "") for text in texts] for texts in (references, hypotheses))
    letters, rate = edit_counts(hypotheses, references, "none", "character"), jiwer.cer(references, hypotheses)
    assert letters[:, :3].sum() / letters[:, 3].sum() == pytest.approx(rate, abs=1e-12)


def test_chinese_with_english_in_it_is_counted_in_characters_and_words():
    # 我 想 用 wifi -> 我 要 用 wi fi: one substitution, and one word heard as two
    assert edit_counts(["我要用 Wi Fi"], ["我想用WiFi。"], "chinese").tolist() == [[2, 0, 1, 4]]
    assert edit_counts(["我有12个苹果"], ["我有十二个苹果"], "chinese")[0].tolist() == [0, 0, 0, 7]


def test_spoken_forms_read_numerals_as_what_was_said():
    assert edit_counts(["9-4 = 5"], ["nine minus four is five"], "spoken")[0].tolist() == [0, 0, 0, 5]


@pytest.mark.parametrize("scorer", [edit_counts, answer_hits, exact_hits, cider_d, rouge_l, repeat_counts])
def test_wrong_lengths_are_refused_with_both(scorer):
    with pytest.raises(ValueError, match="got 1 and 2"):
        scorer(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 and 0"):
        scorer([], [])


@pytest.mark.parametrize("scorer", [answer_hits, exact_hits, cider_d, rouge_l])
def test_a_row_without_a_reference_is_refused_by_number(scorer):
    with pytest.raises(ValueError, match="row 1"):
        scorer(["a", "b"], [["a"], ["", " "]])


def test_references_without_any_word_are_refused():
    with pytest.raises(ValueError, match="no word at all"):
        edit_counts(["a", "b"], ["...", ""], "plain")


# ------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("It is Paris, of course.", ["Paris"], True),
        ("The comparison", ["Paris"], False),  # words, not letters
        ("In São Paulo", "sao paulo", True),
        ("Sao is near Paulo", "São Paulo", False),  # the words stand in a row
        ("Shakespeare wrote it", ["Marlowe", "William Shakespeare", "Shakespeare"], True),
        ("the beatles", ["Beatles, The"], True),
        ("", ["Paris"], False),
        ("A", ["the"], False),
        ("the", ["The"], True),
        ("1942", ["1942"], True),
        ("１９４２年", ["1942年"], True),
        ("首都是北京。", ["北京"], True),  # in scripts without blanks a sign is what elsewhere is a word
        ("北海道と東京です", "東京", True),
        ("北方的南京", ["北京"], False),
        ("เมืองหลวงคือกรุงเทพ", ["กรุงเทพ"], True),
    ],
)
def test_an_answer_is_right_where_a_reference_stands_in_it(answer, references, right):
    assert answer_hits([answer], [references]).tolist() == [[right, 1]]


def test_exact_answers_are_the_reference_and_nothing_else():
    hits = exact_hits(["Seven plus eight is fifteen.", "it is fifteen"], ["seven plus eight is fifteen", "fifteen"])
    assert hits.tolist() == [[1, 1], [0, 1]]


def test_repeating_counts_well_repeated_rows_and_their_errors():
    said, right = ["a b c d", "a b c x", "x y z d", ""], ["a b c d"] * 4
    assert repeat_counts(said, right, "none").tolist() == [[1, 0, 4, 1], [1, 1, 4, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    result = load_scorer("repeat_score").compute(predictions=said, references=right, normalizer="none")
    assert result["repeat_score"] == pytest.approx(100 * (2 / 4) * (1 - 1 / 8))
    assert 0 <= result["low"] < result["repeat_score"] < result["high"] <= 100
    nothing = load_scorer("repeat_score").compute(predictions=["x"], references=["a b"], normalizer="none")
    assert nothing["repeat_score"] == 0


# ------------------------------------------------------------------------------------------------ captions

CAPTIONS = [
    ("a dog barks loudly", ["a dog is barking", "a dog barks at a car"]),
    ("rain falls on a roof", ["rain is falling on the roof", "water drips"]),
    ("", ["birds sing in a tree"]),
    ("people talk while music plays", ["people talk while music plays"]),
]
# What pycocoevalcap 1.2 gives for them. (Its wheel is 100 MB of Java, so the tests' environment does without.)
COCO_CIDER = [2.7268250601346566, 0.7829342341405789, 0.0, 10.0]
COCO_ROUGE = [0.5791139240506329, 0.5366568914956013, 0.0, 1.0]


def test_cider_d_of_a_case_worked_out_by_hand():
    # Two rows of one reference. Every word of a row occurs in one row of two: idf = ln 2, and all tf-idf vectors are
    # ln 2 times counts. "a b" against "a b c": 1-grams min = 2, norms sqrt 2 and sqrt 3; 2-grams 1 of norms 1 and
    # sqrt 2; no 3-grams in the answer. Lengths differ by one.
    scores = cider_d(["a b", "x y z"], ["a b c", "x y z"])[:, 0]
    damping = math.exp(-1 / 72)
    assert scores[0] == pytest.approx(10 / 4 * damping * (2 / math.sqrt(6) + 1 / math.sqrt(2)))
    assert scores[1] == pytest.approx(10 * 3 / 4)  # no 4-grams in three words
    assert cider_d(["a b c d e"], ["a b c d e"])[0, 0] == 0  # in a single row every word is in every row


def test_rouge_l_of_a_case_worked_out_by_hand():
    # "a b c d" against "a c d e f": a c d in common, precision 3/4, recall 3/5
    precision, recall, square = 3 / 4, 3 / 5, 1.44
    expected = (1 + square) * precision * recall / (recall + square * precision)
    assert rouge_l(["a b c d", ""], [["a c d e f", "x"], "y"])[:, 0] == pytest.approx([expected, 0])


def test_captions_are_scored_as_pycocoevalcap_scores_them():
    texts, references = [text for text, _ in CAPTIONS], [row for _, row in CAPTIONS]
    cider, rouge = COCO_CIDER, COCO_ROUGE
    try:
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        pass
    else:
        truth, said = dict(enumerate(references)), {index: [text] for index, text in enumerate(texts)}
        cider, rouge = Cider().compute_score(truth, said)[1], Rouge().compute_score(truth, said)[1]
    assert cider_d(texts, references)[:, 0] == pytest.approx(cider, abs=1e-6)
    assert rouge_l(texts, references)[:, 0] == pytest.approx(rouge, abs=1e-6)


# ------------------------------------------------------------------------------------------------ ratings, modules


def test_ratings_become_points_and_one_out_of_range_is_refused():
    scorer = load_scorer("mean_rating")
    assert scorer.compute(predictions=[1, 4], references=["", ""], highest=5)["rating"] == 50
    with pytest.raises(ValueError, match="0 to 10"):
        scorer.compute(predictions=[11], references=[""])


@pytest.mark.parametrize(
    "name", ["error_rate", "answer_accuracy", "exact_answers", "cider_d", "rouge_l", "repeat_score"]
)
def test_every_scorer_is_a_module_of_evaluate_with_an_interval(name):
    scorer = load_scorer(name)
    said = ["one two three", "four five six", "seven eight", "nine"] * 5
    right = ["one two three", "four five", "seven nine", "nine"] * 5
    result = scorer.compute(predictions=said, references=right)
    assert result["rows"] == 20 and result["low"] <= result[scorer.figure] <= result["high"]
    assert "low" not in scorer.compute(predictions=said, references=right, interval=False)
    scorer.add_batch(predictions=said, references=right)  # the other way to use a module
    assert scorer.compute()[scorer.figure] == result[scorer.figure]
    assert isinstance(scorer, RowScorer)


def test_a_scorer_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="'bleu'.*answer_accuracy, cider_d, error_rate"):
        load_scorer("bleu")


def test_a_module_that_is_not_seen_yet_is_looked_for_again(monkeypatch):
    real, calls = evaluate.load, []

    def load(path):
        calls.append(path)
        if len(calls) == 1:
            raise ModuleNotFoundError(path)
        return real(path)

    monkeypatch.setattr(evaluate, "load", load)
    assert load_scorer("exact_answers").figure == "exact" and len(calls) == 2


def test_a_scorer_is_the_compute_metrics_of_a_trainer():
    """A model that knows one word of two writes it everywhere; the Trainer reports the error rate of what it wrote."""
    words = ["zero", "one", "two"]

    class Writer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = torch.nn.Parameter(torch.tensor([0.0, 1.0, 0.0]))

        def forward(self, labels):
            return {"loss": self.scores.sum() * 0, "logits": self.scores.expand(*labels.shape, 3)}

    scorer = load_scorer("error_rate")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        written = [" ".join(words[i] for i in row) for row in prediction.predictions.argmax(-1)]
        right = [" ".join(words[i] for i in row) for row in prediction.label_ids]
        return scorer.compute(predictions=written, references=right, normalizer="none", interval=False)

    rows = [{"labels": torch.tensor([1, 1])}, {"labels": torch.tensor([1, 2])}]
    trainer = Trainer(
        Writer(),
        TrainingArguments("unused", use_cpu=True, report_to="none"),
        eval_dataset=rows,
        compute_metrics=compute_metrics,
    )
    assert trainer.evaluate()["eval_error_rate"] == 1 / 4


# ------------------------------------------------------------------------------------------------ languages


@pytest.mark.parametrize(
    ("language", "said", "heard", "counts"),
    [
        ("en", "nine minus four", "9-4", (0, 3)),
        ("de", "gehen um acht", "gehen acht", (1, 3)),  # "um" is no hesitation there
        ("de", "schöne Grüße", "schone Grüße", (1, 2)),
        ("zh", "今天天气", "今天天汽", (1, 4)),
        ("zh-CN", "打开 WiFi", "打开WIFI。", (0, 3)),
        ("ja", "ありがとう", "ありがと", (1, 5)),
        ("auto", "привет мир", "Привет, мир!", (0, 2)),
    ],
)
def test_errors_are_counted_by_the_language_that_is_spoken(language, said, heard, counts):
    assert count_errors([said], [heard], language) == [counts]
    options = error_rate_options(language)
    if language != "en":  # whose spelling is set aside here, and normalised as Whisper does in the scorer
        edits = edit_counts([heard], [said], **options)[0]
        assert (edits[:3].sum(), edits[3]) == counts


def test_texts_of_signs_that_english_does_not_know_are_not_all_the_same():
    assert spoken_form("今天", "en") != spoken_form("明天", "en")
    assert spoken_form("Nine!", "en") == spoken_form("9", "en") == "nine"


# ------------------------------------------------------------------------------------------------ intervals


def test_an_interval_covers_the_figure_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        hits = (rng.random(80) < 0.3).astype(float)
        low, high = bootstrap_interval(np.stack([hits, np.ones(80)], axis=1))
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_an_interval_does_not_depend_on_the_order_in_which_it_is_asked_for():
    counts = np.stack([np.arange(50.0), np.full(50, 60.0)], axis=1)
    assert bootstrap_interval(counts) == bootstrap_interval(counts)


@pytest.mark.parametrize("right", [0, 1])
def test_a_share_in_which_all_rows_agree_has_an_interval_all_the_same(right):
    low, high = bootstrap_interval(np.array([[right, 1]] * 30, float))
    bound = 0.025 ** (1 / 30)  # 30 of 30 are right with a chance of 2.5 % if so many are
    assert (low, high) == pytest.approx((bound, 1.0) if right else (0.0, 1 - bound))


def test_no_rows_and_one_row_of_a_rate_have_no_interval():
    assert np.isnan(bootstrap_interval(np.zeros((0, 2)))).all()
    assert np.isnan(bootstrap_interval(np.array([[1.0, 5.0]]))).all()  # 1 error in 5 words, and nothing to draw
    assert np.isnan(difference_interval(np.array([[1.0, 5.0]]), np.array([[4.0, 5.0]]), True)).all()
    assert bootstrap_interval(np.array([[1.0, 1.0]])) == (0.025, 1.0)  # of a share its exact bound


def test_a_difference_in_which_all_rows_agree_has_an_interval_all_the_same():
    def all_of(value, rows):
        return np.array([[value, 1]] * rows, float)

    for first, second, sign in ((1, 0, 1), (0, 1, -1)):  # every pair got worse, or better
        for rows in (1, 5, 6, 30):
            interval = difference_interval(all_of(first, rows), all_of(second, rows), True)
            bound = 1 - 2 * 0.025 ** (1 / rows)
            assert interval == pytest.approx((-1, bound) if sign > 0 else (-bound, 1))
            # As the sign test has it: n pairs of one mind have a chance of 2 / 2 ** n.
            assert (interval[0] <= 0 <= interval[1]) == (2 / 2**rows > 0.05)
    assert difference_interval(all_of(1, 3), all_of(1, 3), True) == (0, 0)
    low, high = difference_interval(all_of(1, 2), all_of(0, 2), False)
    assert low == -1 and high == pytest.approx(1 - 2 * 0.025**0.5)


def test_a_difference_of_paired_rows_is_known_better_than_of_others():
    rng = np.random.default_rng(2)
    first = np.stack([(rng.random(200) < 0.5).astype(float), np.ones(200)], axis=1)
    second = first.copy()
    second[:10, 0] = 1.0  # a few rows that were wrong are right
    paired, other = (difference_interval(first, second, is_paired) for is_paired in (True, False))
    assert paired[0] > 0 and other[0] < 0 < other[1]
    with pytest.raises(ValueError, match="200 and 10"):
        difference_interval(first, second[:10], True)
