package memmap

import (
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"

	"golang.org/x/image/font"
	"golang.org/x/image/font/basicfont"
	"golang.org/x/image/math/fixed"

	"fcvm/internal/ui"
)

// The colours: what costs nothing recedes into the background, shared is blue and
// private orange (which colour-blind people can tell apart, too), and what is in
// the working set is the same hue, lit.
var (
	background = color.RGBA{0x12, 0x14, 0x1a, 0xff}
	ink        = color.RGBA{0xe6, 0xe8, 0xec, 0xff}
	faint      = color.RGBA{0x8a, 0x90, 0x9c, 0xff}
)

// colours returns how a page in this state is drawn: outside of the working set
// and in it.
func colours(state Page) (out, in color.RGBA) {
	switch state {
	case Untouched:
		return color.RGBA{0x22, 0x26, 0x30, 0xff}, color.RGBA{0x6b, 0x4f, 0x9e, 0xff}
	case Zero:
		return color.RGBA{0x3c, 0x42, 0x4e, 0xff}, color.RGBA{0x9a, 0xa2, 0xb0, 0xff}
	case Data:
		return color.RGBA{0x1f, 0x7a, 0x8c, 0xff}, color.RGBA{0xff, 0xd1, 0x5c, 0xff}
	case Shared:
		return color.RGBA{0x25, 0x63, 0xb0, 0xff}, color.RGBA{0x7c, 0xc4, 0xff, 0xff}
	default: // Private
		return color.RGBA{0xc2, 0x56, 0x1a, 0xff}, color.RGBA{0xff, 0xb3, 0x57, 0xff}
	}
}

// headGap and legendGap are above and below the pages.
const (
	headGap   = 6
	legendGap = 10
)

// Sizes in pixels. The font's characters are 7 × 13.
const (
	margin     = 12
	charWidth  = 7
	lineHeight = 18
	ascent     = 11
	swatch     = 12
)

// canvas is a picture of few colours: a PNG of it is small.
type canvas struct {
	*image.Paletted
	face font.Face
}

// index of a colour in the palette, in which it is entered when it is new.
func (c *canvas) index(col color.RGBA) uint8 {
	for i, p := range c.Palette {
		if p == col {
			return uint8(i)
		}
	}
	c.Palette = append(c.Palette, col)
	return uint8(len(c.Palette) - 1)
}

func (c *canvas) fill(r image.Rectangle, col color.RGBA) {
	draw.Draw(c, r, image.NewUniform(c.Palette[c.index(col)]), image.Point{}, draw.Src)
}

// text writes s with its upper left corner at p.
func (c *canvas) text(p image.Point, s string, col color.RGBA) {
	c.index(col)
	d := font.Drawer{Dst: c, Src: image.NewUniform(col), Face: c.face, Dot: fixed.P(p.X, p.Y+ascent)}
	d.DrawString(s)
}

// Picture draws the map: a title, the pages, and a legend that counts. Up to 4
// GiB (of 4 KiB pages) each page has its own square; beyond, one page stands for
// itself and its neighbours. Each block is 4096 squares (16 MiB), filled along a
// Hilbert curve from its upper left to its upper right corner; blocks follow each
// other like words in a text, and the address of each line's first is beside it.
// The map must pass [Map.Check].
func (m *Map) Picture() *image.Paletted {
	l := newLayout(len(m.Pages))
	labels := m.labels(l)
	gutter := 0
	for _, s := range labels {
		gutter = max(gutter, len(s)*charWidth+8)
	}
	lines := m.legend()
	head := []string{m.Title, fmt.Sprintf("%s, %d pages of %s", ui.Size(m.Bytes()), len(m.Pages), ui.Size(m.PageBytes))}
	foot := m.scale(l)

	width := gutter + l.size().X
	for _, s := range append(head, foot) {
		width = max(width, len(s)*charWidth)
	}
	for _, line := range lines {
		width = max(width, line.width())
	}
	top := margin + len(head)*lineHeight + headGap
	legendTop := top + l.size().Y + legendGap
	height := legendTop + (len(lines)+1)*lineHeight + margin
	c := &canvas{image.NewPaletted(image.Rect(0, 0, width+2*margin, height), color.Palette{background}), basicfont.Face7x13}

	c.text(image.Pt(margin, margin), head[0], ink)
	c.text(image.Pt(margin, margin+lineHeight), head[1], faint)
	for row, s := range labels {
		p := image.Pt(margin+gutter-8-len(s)*charWidth, top+row*l.pitch())
		c.text(p, s, faint)
	}
	c.pages(m, l, image.Pt(margin+gutter, top))
	for i, line := range lines {
		c.line(image.Pt(margin, legendTop+i*lineHeight), line)
	}
	c.text(image.Pt(margin, legendTop+len(lines)*lineHeight), foot, faint)
	return c.Paletted
}

// WritePNG writes the picture in PNG format.
func (m *Map) WritePNG(w io.Writer) error {
	enc := png.Encoder{CompressionLevel: png.BestCompression}
	if err := enc.Encode(w, m.Picture()); err != nil {
		return fmt.Errorf("write picture: %w", err)
	}
	return nil
}

// pages draws the squares, the first block's corner at origin.
func (c *canvas) pages(m *Map, l *layout, origin image.Point) {
	var index [256]uint8
	for _, s := range m.States {
		out, in := colours(s)
		index[s], index[s|InWorkingSet] = c.index(out), c.index(in)
	}
	for i := range l.cells() {
		r := l.cell(i).Add(origin)
		col := index[m.Pages[l.sample(i)]]
		for y := r.Min.Y; y < r.Max.Y; y++ {
			for x := r.Min.X; x < r.Max.X; x++ {
				c.SetColorIndex(x, y, col)
			}
		}
	}
}

// labels returns the address of the first page of each row of blocks.
func (m *Map) labels(l *layout) []string {
	labels := make([]string, l.rows())
	for row := range labels {
		labels[row] = ui.Size(int64(row*l.columns*blockCells*l.per) * m.PageBytes)
	}
	return labels
}

// scale says what a square is.
func (m *Map) scale(l *layout) string {
	s := "a square is one page"
	if l.per > 1 {
		s = fmt.Sprintf("a square is one of %d pages", l.per)
	}
	return fmt.Sprintf("%s; a block is %s, along a Hilbert curve", s, ui.Size(int64(blockCells*l.per)*m.PageBytes))
}
