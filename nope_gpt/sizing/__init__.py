"""The calculator: parameters, arithmetic, memory, time, and plans that fit; without torch."""
