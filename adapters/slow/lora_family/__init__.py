"""What the methods of the LoRA family share; peft is imported when one of them is asked for."""
