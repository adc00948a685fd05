package snapshot

// nearest returns the name that is the fewest edits away from want, when these
// are few enough for a slip of the fingers, else "".
func nearest(want string, names []string) string {
	best, bestDist := "", (len(want)+1)/3+1
	for _, n := range names {
		if d := distance(want, n); d < bestDist {
			best, bestDist = n, d
		}
	}
	return best
}

// distance is Levenshtein's: insertions, deletions and replacements.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
