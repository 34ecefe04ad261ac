"""Are heatmaps true? The paper's protocol, faithfulness, sanity of the head, localisation, and a verdict in words."""
