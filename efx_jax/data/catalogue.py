"""The paper's tasks: what each asks, and where its official files and Hub tables are.

The fields of every prompt, their order and the answers follow the prompts of the paper's appendix H and of the authors'
repository (TagoreZhao/Efficient_Domain_Adaptation, data/templates.py); the wording of the instructions is our own. In
ContractNLI the document precedes the hypothesis, so that the document's 17 prompts share a prefix.
"""

import dataclasses
from collections.abc import Mapping

from efx_jax.data import health, legal
from efx_jax.data.hub import PARQUET_BRANCH, HubTable
from efx_jax.data.official import Official, Split
from efx_jax.data.records import NLI_LABELS

_SUMMARY_TOKENS = 64
_BILL_TOKENS = 256

_PUBMEDQA = Official(
    name="pubmedqa",
    folders=("pubmedqa",),
    labels=health.PUBMEDQA_LABELS,
    instruction="Answer the research question from the abstract of a medical article. Reply with yes, no or maybe.",
    fields=(("Abstract", "abstract"), ("Sections", "sections"), ("MeSH terms", "mesh"), ("Question", "question")),
    context="Abstract",
    identity=(("question", "abstract"),),
    splits={
        "train": Split(
            (("ori_pqal.json",), ("test_ground_truth.json",)),
            health.pubmedqa_train,
            HubTable("qiaojin/PubMedQA", "pqa_labeled"),
            health.pubmedqa_table_train,
        ),
        "artificial": Split(
            (("ori_pqaa.json",),),
            health.pubmedqa_rows,
            HubTable("qiaojin/PubMedQA", "pqa_artificial"),
            health.pubmedqa_table,
        ),
        "test": Split(
            (("ori_pqal.json",), ("test_ground_truth.json",)),
            health.pubmedqa_test,
            HubTable("qiaojin/PubMedQA", "pqa_labeled"),
            health.pubmedqa_table_test,
        ),
    },
    source="get them from github.com/pubmedqa/pubmedqa",
)

_NLI_FIELDS = (("Premise", "premise"), ("Hypothesis", "hypothesis"))
_MEDNLI = Official(
    name="mednli",
    folders=("mednli", "mednli-a-natural-language-inference-dataset-for-the-clinical-domain-1.0.0"),
    labels=NLI_LABELS,
    instruction=(
        "The premise is taken from a patient's record. Decide whether the hypothesis follows from it (entailment), is "
        "ruled out by it (contradiction) or is left open (neutral). Reply with entailment, contradiction or neutral."
    ),
    fields=_NLI_FIELDS,
    context="Premise",
    identity=(("premise",),),
    splits={
        "train": Split((("mli_train_v1.jsonl",),), health.mednli),
        "validation": Split((("mli_dev_v1.jsonl",),), health.mednli),
        "test": Split((("mli_test_v1.jsonl",),), health.mednli),
    },
    source="get your own credentialed copy from physionet.org/content/mednli",
)

_HQS = Official(
    name="hqs",
    folders=("hqs",),
    labels=(),
    instruction=(
        "Summarise the consumer's health question as one short question that keeps the condition, the treatment or "
        "test and what is being asked."
    ),
    fields=(("Question", "question"),),
    context="Question",
    identity=(("question",),),
    splits={
        "train": Split(
            (("MeQSum_ACL2019_BenAbacha_Demner-Fushman.xlsx", "MeQSum.xlsx"),),
            health.meqsum,
            HubTable("albertvillanova/meqsum"),
            health.meqsum_table,
        ),
        "validation": Split((("MEDIQA2021-Task1-QuestionSummarization-ValidationSet.xlsx",),), health.mediqa),
        "test": Split((("MEDIQA2021-Task1-TestSet-ReferenceSummaries.xlsx",),), health.mediqa),
    },
    source="get them from github.com/abachaa/MeQSum and github.com/abachaa/MEDIQA2021",
    new_tokens=_SUMMARY_TOKENS,
)

_EVIDENCE_FILES = (("v2_annotations.csv",), ("prompts_merged.csv",))
_EVIDENCE = Official(
    name="evidence_inference",
    folders=("evidence_inference",),
    labels=health.EVIDENCE_LABELS,
    instruction=(
        "The premise is a passage of a report on a clinical trial. Decide whether it supports the hypothesis "
        "(entailment), reports the opposite (contradiction) or reports no significant difference (no difference). "
        "Reply with entailment, contradiction or no difference."
    ),
    fields=_NLI_FIELDS,
    context="Premise",
    identity=(("premise",),),
    splits={
        name: Split((*_EVIDENCE_FILES, (f"splits/ev2_{name}_article_ids.txt",)), health.evidence_inference)
        for name in ("train", "validation", "test")
    },
    source="get them from github.com/jayded/evidence-inference, annotations/",
    note="Evidence Inference 2.0, an open stand-in where MedNLI is missing; its scores are not MedNLI's",
)

_CASEHOLD = Official(
    name="casehold",
    folders=("casehold",),
    labels=legal.CASEHOLD_LABELS,
    instruction=(
        "The excerpt of a court decision cites another case, whose holding is left out. Choose the holding that fits. "
        "Reply with its number: 0, 1, 2, 3 or 4."
    ),
    fields=(("Excerpt", "citing_prompt"), *((label, f"holding_{label}") for label in legal.CASEHOLD_LABELS)),
    context="Excerpt",
    cut="beginning",  # the marker <HOLDING>, where the holding was cited, is among the excerpt's last words
    identity=(("citing_prompt",),),
    splits={
        split: Split(
            ((f"{stem}.csv", f"{split}.jsonl"),),
            legal.casehold,
            HubTable("casehold/casehold", "all", split, revision=PARQUET_BRANCH),
            legal.casehold_table,
        )
        for split, stem in (("train", "train"), ("validation", "val"), ("test", "test"))
    },
    source="get them from github.com/reglab/casehold",
)

_LEXGLUE = dataclasses.replace(
    _CASEHOLD,
    name="casehold_lexglue",
    folders=("lex_glue",),
    splits={
        split: Split(
            ((f"case_hold_{split}.jsonl",),),
            legal.casehold,
            HubTable("coastalcph/lex_glue", "case_hold", split),
            legal.casehold_table,
        )
        for split in ("train", "validation", "test")
    },
    source="get it from the Hub's coastalcph/lex_glue",
    note="LexGLUE's own split of CaseHOLD; its test rows are not those of the original split",
)

_CONTRACT_NLI = Official(
    name="contract_nli",
    folders=("contract_nli", "contract-nli"),
    labels=NLI_LABELS,
    instruction=(
        "Read the contract and decide whether the hypothesis is stated or implied by it (entailment), contradicts it "
        "(contradiction) or is not mentioned in it (neutral). Reply with entailment, contradiction or neutral."
    ),
    fields=(("Contract", "document"), ("Hypothesis", "hypothesis")),
    context="Contract",
    identity=(("document",),),
    splits={
        split: Split(
            ((f"{stem}.json", *others, f"{stem}.jsonl", f"{stem}.csv", f"{stem}.tsv"),),
            legal.contract_nli,
            # "contractnli_a", short premises, has the 1,991 test rows of the paper's table 11.
            HubTable("kiddothe2b/contract-nli", "contractnli_a", split, revision=PARQUET_BRANCH),
            legal.contract_nli_table,
        )
        for split, stem, others in (
            ("train", "train", ("train_truncated.json",)),
            ("validation", "dev", ()),
            ("test", "test", ()),
        )
    },
    source="get them from stanfordnlp.github.io/contract-nli",
)

_BILLSUM = Official(
    name="billsum",
    folders=("billsum",),
    labels=(),
    instruction="Summarise the bill: what it does, for whom, and to what end.",
    fields=(("Title", "title"), ("Text", "text")),
    context="Text",
    identity=(("text",), ("answer",)),
    splits={
        split: Split(
            ((f"us_{split}_data_final_OFFICIAL.jsonl", f"us_{split}_data.jsonl", f"{split}.jsonl"),),
            legal.billsum,
            HubTable("FiscalNote/billsum", split=split),
            legal.billsum_table,
        )
        for split in ("train", "test")
    },
    source="get them from github.com/FiscalNote/BillSum",
    new_tokens=_BILL_TOKENS,
)

_ALL = (_PUBMEDQA, _MEDNLI, _HQS, _EVIDENCE, _CASEHOLD, _LEXGLUE, _CONTRACT_NLI, _BILLSUM)
OFFICIAL: Mapping[str, Official] = {task.name: task for task in _ALL}
