"""Names and limits of the engine that arguments and help need. Where torch is there, a test holds them equal."""

LONGEST_LINE = 64 * 2**20  # bytes
LONGEST_TEXT = 8 * 2**20  # bytes of UTF-8
TASKS = ("embed", "rerank", "classify", "score")  # that a server does
POOLINGS = ("last", "mean", "weightedmean", "mean_sqrt_len_tokens", "max", "cls")
OUTPUT_DTYPES = ("float32", "float16", "int8")  # of embeddings
TEMPLATES = ("qwen3-reranker",)
LABEL_PROMPTS = ("qwen3guard", "shieldgemma")
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
READINGS = ("pairs", "chat")
KINDS = ("jsonl", "json", "text", "csv", "tsv", "parquet", "arrow", "npz")
SHAPES = {  # of rows that each command knows
    "score": (
        "ids", "text", "context", "contexts", "question", "mmlu", "commonsense-qa", "arc", "openbookqa", "mmlu-pro",
        "hellaswag", "piqa", "winogrande", "boolq", "sciq",
    ),
    "rerank": ("ids", "documents", "msmarco", "mteb", "bge", "tevatron"),
    "embed": ("ids", "text", "beir"),
    "classify": ("ids", "text", "sentence", "sentences", "nli", "text-a-b", "text-1-2", "questions", "qnli"),
}  # fmt: skip
SHAPES["inspect"] = tuple(dict.fromkeys(SHAPES["score"] + SHAPES["rerank"] + SHAPES["embed"] + SHAPES["classify"]))
SEED = 0  # of the shuffled order
