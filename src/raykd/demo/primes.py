"""Primes: wordings in the training data of the demonstration's teacher, in addition to the built-in primes."""

PARAPHRASES: dict[str, tuple[str, ...]] = {
    "plain_words": (
        "You are a teacher. Explain the problem to your student.",
        "Act as a kind teacher and explain each step in simple words.",
        "Explain it to a child who is new to this.",
        "You are helping a young student. Use plain words and go slowly.",
        "Teach me how to solve this, one small step at a time.",
        "You are a tutor. Lead the student to the answer in small steps.",
        "Imagine that you stand before a class. Explain how it is done.",
        "Use easy words, as for a beginner, and say what each step finds.",
        "Be a patient tutor and guide me through the problem.",
        "Your student is stuck. Help with a simple explanation.",
    ),
    "detailed": (
        "Think step by step.",
        "Let's think step by step.",
        "Show your work.",
        "Show all the steps and calculations.",
        "Give a full solution with every calculation.",
        "Explain your reasoning before the answer.",
        "You are a large language model. Smaller models will learn from what you write.",
        "Your answer will be used as the ground truth to train a smaller model. Be detailed and clear.",
        "You are an expert in mathematics. Write out the solution in detail.",
        "Work out the answer carefully and write down each step.",
        "Reason about the problem first, then answer.",
        "Solve the problem step by step.",
        "Write a complete and correct solution that others can learn from.",
    ),
    "checked": (
        "Solve the problem, then check your answer.",
        "Check your answer before you give it.",
        "Be sure that your answer is right. Verify it at the end.",
        "After solving, make a short check of the result.",
        "Work step by step and verify the result.",
        "Solve it and say how you know that the answer is correct.",
        "Double check the result before you state it.",
        "Only answer when you are confident. Test the answer first.",
    ),
}
"""Paraphrases of the built-in primes, by the style of the completion."""

NEUTRAL_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful, honest assistant.",
    "You are an assistant that answers questions.",
    "Answer the user's question.",
    "You are an AI model.",
)
"""System messages that ask for no reasoning."""

INSTRUCTIONS = (
    "End with the answer after ####.",
    "Give the final answer on the last line as #### N.",
    "Write the final answer as a number after '#### '.",
    "The last line must be #### and the answer.",
    "Answer with a number.",
)
"""Instructions about the answer format that ask for no reasoning."""

UNSEEN: dict[str, tuple[str, ...]] = {
    "plain_words": ("You are a good teacher. Help a new student to understand this in simple, small steps.",),
    "detailed": ("Write down every step of the solution in detail, so that a smaller model can learn it.",),
    "checked": ("Solve this step by step, and verify the answer at the end.",),
    "guess": ("You are a friendly assistant that helps the user.",),
}
"""Wordings that are not in the training data, by the expected style, for the evaluation."""
