"""Ordinary questions for demonstrations and benchmarks of serving, short and long ones mixed."""

from __future__ import annotations

PROMPTS = (
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "What should I pack for a weekend of hiking in the mountains in October?",
    "Give me three ideas for a birthday dinner for a friend who does not eat meat.",
    "How does a bicycle stay upright while it moves?",
    "Write a polite e-mail to my landlord. The heating in the kitchen has not worked since "
    "Monday, it is getting cold, and I would like somebody to look at it this week.",
    "What is the difference between weather and climate?",
    "Tell me about the history of the printing press.",
    "I have two eggs, some rice, an onion and half a cabbage. What can I cook tonight?",
    "Explain how vaccines train the immune system.",
    "Describe a busy railway station early in the morning.",
    "My six-year-old asks where the sun goes at night. How do I answer?",
    "Summarise the following in two sentences: The library opened in 1904 with four hundred "
    "books, most of them gifts. For thirty years it was run by one woman, who knew each reader "
    "by name. Today it lends more music than novels, but on the first floor the old reading "
    "room is still there, with the green lamps and the rule that nobody may speak.",
    "How do I start running if I have not done any sport for ten years?",
    "What makes bread rise, and why does it sometimes fail to?",
    "Write a poem about the first snow of the year.",
    "Explain compound interest with an example.",
    "Which questions should I ask when I rent a flat?",
    "How do birds find their way when they migrate?",
    "Give me a plan for learning to play the guitar in three months.",
    "Why do leaves change their colour in autumn?",
    "Write a dialogue between a cat and a dog who share a sofa.",
    "What are the duties of a ship's captain?",
    "Explain to a beginner what a computer program is.",
)
