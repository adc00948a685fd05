package proto

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"
)

// Stream says where the data of a [LogRecord] came from.
type Stream uint8

// The streams of a log.
const (
	Stdout Stream = 1
	Stderr Stream = 2
	// Exit is the last record of a container: its ExitCode is valid, and Data
	// holds a message when the process could not be run to its end.
	Exit Stream = 3
)

// LogRecord is one piece of the guest's log port: container.log on the host is
// a sequence of these. Data need not end at the end of a line.
type LogRecord struct {
	Stream Stream
	// Time by the guest's clock.
	Time time.Time
	Data []byte
	// ExitCode is valid when Stream is Exit.
	ExitCode int
}

// On the wire: magic, stream, a zero byte, uint16 length, int64 nanoseconds
// since 1970, int32 exit code, CRC-32C of all the other fields; big-endian. The
// magic and the sum let a reader find the next record after a torn one.
const (
	recordHeader = 24
	// MaxRecordData is the most data one record holds. A whole record fits into
	// one write to a virtio-serial port, which takes at most 32 KiB
	// (drivers/char/virtio_console.c, port_fops_write), so records never tear in
	// the guest.
	MaxRecordData = 32<<10 - recordHeader
)

var recordMagic = [4]byte{0xfc, 'L', 'O', 'G'}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// AppendLogRecord appends the encoding of r to b. Data over [MaxRecordData] is
// cut off.
func AppendLogRecord(b []byte, r LogRecord) []byte {
	data := r.Data
	if len(data) > MaxRecordData {
		data = data[:MaxRecordData]
	}
	start := len(b)
	b = append(b, recordMagic[:]...)
	b = append(b, byte(r.Stream), 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(data)))
	b = binary.BigEndian.AppendUint64(b, uint64(r.Time.UnixNano()))
	b = binary.BigEndian.AppendUint32(b, uint32(int32(r.ExitCode)))
	sum := crc32.Update(crc32.Checksum(b[start:], castagnoli), castagnoli, data)
	b = binary.BigEndian.AppendUint32(b, sum)
	return append(b, data...)
}

// WriteLogRecord writes r with as many records as its data needs, one Write
// each.
func WriteLogRecord(w io.Writer, r LogRecord) error {
	for {
		part := r
		if len(part.Data) > MaxRecordData {
			part.Data = part.Data[:MaxRecordData]
		}
		if _, err := w.Write(AppendLogRecord(nil, part)); err != nil {
			return fmt.Errorf("write log record: %w", err)
		}
		r.Data = r.Data[len(part.Data):]
		if len(r.Data) == 0 {
			return nil
		}
	}
}

// LogReader reads log records. It skips whatever is not one. It holds one
// record's memory.
type LogReader struct {
	r   *bufio.Reader
	off int64
}

// NewLogReader returns a LogReader on r.
func NewLogReader(r io.Reader) *LogReader {
	return &LogReader{r: bufio.NewReaderSize(r, recordHeader+MaxRecordData)}
}

// Offset is the number of bytes that were consumed: the next record begins at
// or after it.
func (lr *LogReader) Offset() int64 { return lr.off }

// Next returns the next record. Data is valid until the next call. At the end
// the error is io.EOF; a record of which only the beginning is there counts as
// the end, and is read in full when r has more by the next call, as a file that
// still grows does.
func (lr *LogReader) Next() (LogRecord, error) {
	for {
		head, err := lr.r.Peek(recordHeader)
		if err != nil {
			return LogRecord{}, endOfLog(err)
		}
		n := int(binary.BigEndian.Uint16(head[6:]))
		stream := Stream(head[4])
		if [4]byte(head) != recordMagic || stream < Stdout || stream > Exit || n > MaxRecordData {
			lr.discard(nextMagic(head))
			continue
		}
		all, err := lr.r.Peek(recordHeader + n)
		if err != nil {
			// A torn record is followed by the next one's magic, if by anything.
			if i := nextMagic(all); i < len(all) && len(all)-i >= len(recordMagic) {
				lr.discard(i)
				continue
			}
			return LogRecord{}, endOfLog(err)
		}
		sum := crc32.Update(crc32.Checksum(all[:recordHeader-4], castagnoli), castagnoli, all[recordHeader:])
		if sum != binary.BigEndian.Uint32(all[recordHeader-4:]) {
			lr.discard(nextMagic(all))
			continue
		}
		rec := LogRecord{
			Stream:   stream,
			Time:     time.Unix(0, int64(binary.BigEndian.Uint64(all[8:]))),
			ExitCode: int(int32(binary.BigEndian.Uint32(all[16:]))),
			Data:     all[recordHeader:],
		}
		lr.discard(recordHeader + n)
		return rec, nil
	}
}

func (lr *LogReader) discard(n int) {
	d, _ := lr.r.Discard(n) // n bytes were peeked, so they are there
	lr.off += int64(d)
}

// nextMagic returns where in b, after its first byte, a record may begin.
func nextMagic(b []byte) int {
	for i := 1; i < len(b); i++ {
		if b[i] == recordMagic[0] && string(b[i:min(i+4, len(b))]) == string(recordMagic[:min(4, len(b)-i)]) {
			return i
		}
	}
	return len(b)
}

func endOfLog(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return io.EOF
	}
	return err
}
