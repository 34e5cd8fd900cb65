"""Adi's scheme: a secret trigger set with random labels that the network has learnt by heart.

[Adi18] Adi, Baum, Cisse, Pinkas, Keshet: Turning Your Weakness Into a Strength: Watermarking Deep
Neural Networks by Backdooring, USENIX Security 2018.

Its rule accepts "all but ε·|T|" of the triggers and leaves ε open; here it is 0.1.
"""

from nnpassport.embedding.schemes.triggered import TriggerSet

ADI = TriggerSet("adi")
