package memmap

import "image"

// The picture is made of blocks, each a square of blockSide × blockSide cells
// that are filled along a Hilbert curve; the blocks stand in rows, as lines of
// text do. The curve keeps what is close in memory close in the picture, in both
// directions, so that an area of one kind is a patch and not a stripe; the rows
// make addresses readable, which on one curve over everything they are not.
const (
	blockSide  = 64
	blockCells = blockSide * blockSide
	// blockGap is between blocks, in pixels.
	blockGap = 2
)

// Up to 1 GiB of 4 KiB pages fits as 8 × 8 blocks of cells of 2 × 2 pixels, up
// to 4 GiB as 16 × 16 blocks of single pixels: both are as wide as a text page.
const (
	fewColumns, fewScale   = 8, 2
	manyColumns, manyScale = 16, 1
)

// layout says where pages are drawn.
type layout struct {
	// pages of the guest; per of them are one cell, a power of two.
	pages, per int
	// scale is the side of a cell in pixels.
	scale   int
	columns int
	curve   [blockCells]image.Point
}

func newLayout(pages int) *layout {
	l := &layout{pages: pages, per: 1, scale: fewScale, columns: fewColumns}
	if pages > fewColumns*fewColumns*blockCells {
		l.scale, l.columns = manyScale, manyColumns
		for pages > l.per*manyColumns*manyColumns*blockCells {
			l.per *= 2
		}
	}
	l.columns = max(1, min(l.columns, l.blocks()))
	for i := range l.curve {
		l.curve[i] = hilbert(blockSide, i)
	}
	return l
}

// cells is how many are drawn.
func (l *layout) cells() int { return (l.pages + l.per - 1) / l.per }

func (l *layout) blocks() int { return (l.cells() + blockCells - 1) / blockCells }

func (l *layout) rows() int { return (l.blocks() + l.columns - 1) / l.columns }

// pitch is the distance from one block to the next, in pixels.
func (l *layout) pitch() int { return blockSide*l.scale + blockGap }

// size of all blocks, in pixels.
func (l *layout) size() image.Point {
	return image.Pt(l.columns*l.pitch()-blockGap, max(0, l.rows()*l.pitch()-blockGap))
}

// cell returns the square of the i-th cell.
func (l *layout) cell(i int) image.Rectangle {
	b := i / blockCells
	p := l.curve[i%blockCells].Mul(l.scale).Add(image.Pt(b%l.columns, b/l.columns).Mul(l.pitch()))
	return image.Rectangle{p, p.Add(image.Pt(l.scale, l.scale))}
}

// sample is the page that stands for the i-th cell. Where a cell is several
// pages, one of them is shown, and not a blend: blends look like other entries of
// the legend. Which one varies from cell to cell, so that the share of each
// colour in the picture is right also where memory has a pattern.
func (l *layout) sample(i int) int {
	// Knuth's multiplicative hash; its upper bits are the good ones.
	h := int(uint32(i) * 2654435761 >> 16)
	return min(i*l.per+h%l.per, l.pages-1)
}

// hilbert returns the d-th point of Hilbert's curve in a square of side n, a
// power of two. The curve begins at the upper left and ends at the upper right.
func hilbert(n, d int) image.Point {
	var p image.Point
	for s := 1; s < n; s *= 2 {
		rx := d / 2 & 1
		ry := (d ^ rx) & 1
		if ry == 0 {
			if rx == 1 {
				p = image.Pt(s-1-p.X, s-1-p.Y)
			}
			p.X, p.Y = p.Y, p.X
		}
		p = p.Add(image.Pt(s*rx, s*ry))
		d /= 4
	}
	return p
}
