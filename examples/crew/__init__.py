"""A small agent framework: a crew of agents that think with a language model and use tools."""

from examples.crew.crew import Crew, Model, Tool

__all__ = ["Crew", "Model", "Tool"]
